"""What the package's tasks share: where their yaml files are, and the schema that checks them."""

from pathlib import Path

from benchmarl.environments import Task, TaskClass

from benchmarl_trust.paths import conf_folder


class PackagedTask(Task):
    """Tasks whose configuration is ``conf/task/<suite>/<name>.yaml`` of this package.

    A suite derives from it with its members, ``associated_class`` as in BenchMARL, and :meth:`schema`.
    """

    def schema(self) -> type:
        """The dataclass that BenchMARL and Hydra check the task's configuration with."""
        raise NotImplementedError

    def get_from_yaml(self, path: str | None = None) -> TaskClass:
        """The task of ``conf/task/<suite>/<name>.yaml``, or of the file at ``path``."""
        name = Path("task") / self.env_name() / f"{self.name.lower()}.yaml"
        return super().get_from_yaml(str(path or conf_folder() / name))
