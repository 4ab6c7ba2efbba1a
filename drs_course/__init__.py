"""The course: Tables 1 to 4 as stored runs, checks of exercises, labs with sliders, figures.

    from drs_course import checks, labs, plots, reference_table, run_row, run_table

It stands on `drs_lib`, which is the paper and knows nothing of it.
"""

from drs_course import checks, labs, plots
from drs_course.tables import reference_table, run_row, run_table

__all__ = ["checks", "labs", "plots", "reference_table", "run_row", "run_table"]
