"""Sphinx settings of the documentation: `make docs`. Offline: no intersphinx, no remote fonts or scripts."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import benchmarl_trust

project = "benchmarl_trust"
release = benchmarl_trust.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
add_module_names = False

html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, as other hosts of Markdown resolve them

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give the types, beside the shapes
autodoc_inherit_docstrings = False  # the hosts' docstrings are not ours to show
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True
nitpick_ignore_regex = [
    # Types of arguments are words, or names of the hosts, which nothing here defines.
    (r"py:class", r"(?!benchmarl_trust\b).*"),
    (r"py:.*", r"(torch|torchrl|tensordict|benchmarl)\..*"),
    # Private bases and the hosts' inner classes, in signatures.
    (r"py:class", r"benchmarl_trust\..*\._\w+"),
]


#: Docstrings have these as they are; as commands they get the space around operators.
OPERATORS = {"±": r"\pm ", "·": r"\cdot ", "≤": r"\le ", "≠": r"\ne ", "←": r"\leftarrow ", "⊙": r"\odot "}


def mathml(node: nodes.math | nodes.math_block) -> str:
    """The formula as MathML, which browsers draw by themselves; MathJax would be fetched from elsewhere."""
    formula = "".join(OPERATORS.get(character, character) for character in node.astext())
    formula = formula.replace(r"\arg\max", r"\operatorname{argmax}")
    converted = convert(formula, display="block" if isinstance(node, nodes.math_block) else "inline")
    if "\\" in converted:
        raise ValueError(f"MathML of {formula} has a command that was not understood.")
    return converted


def visit_math(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    """A formula within a line."""
    translator.body.append(mathml(node))
    raise nodes.SkipNode


def visit_math_block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """A formula on a line of its own."""
    translator.body.append(f'<div class="math">{mathml(node)}</div>')
    raise nodes.SkipNode


def resolve_by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element):
    """A name of this package that a docstring has from where it is exported, found where it is defined."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    package, _, last = node["reftarget"].rpartition(".")
    found = [name for name in domain.objects if name.startswith(package) and name.endswith(f".{last}")]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode)


#: Docstrings of constants and attributes as they were before napoleon, which takes what is before a colon for a type.
plain: dict[str, list[str]] = {}


def before_napoleon(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Keep what napoleon is not to change."""
    if what in ("data", "attribute", "property"):
        plain[name] = list(lines)


def after_napoleon(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Escape the star of shapes such as [*, D]: it is not the beginning of emphasis."""
    lines[:] = [re.sub(r"(?<=\[)\*|\*(?=\])", r"\*", line) for line in plain.pop(name, lines)]


def is_field(app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object) -> bool | None:
    """Leave out a named tuple's fields, which its docstring lists."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Add what the settings above name and Sphinx does not have."""
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    app.connect("autodoc-skip-member", is_field)
    app.connect("missing-reference", resolve_by_last_name)
