"""Tables and pictures of BenchMARL runs, of any algorithm: ``python -m benchmarl_trust.report FOLDER...``.

Reading is in :mod:`~benchmarl_trust.report.runs` and :mod:`~benchmarl_trust.report.compact`, the numbers are in
:mod:`~benchmarl_trust.report.statistics` and :mod:`~benchmarl_trust.report.aggregates`, the drawing is in
:mod:`~benchmarl_trust.report.pictures`. It needs the extra ``report``; ``import benchmarl_trust`` does not import it.
"""
