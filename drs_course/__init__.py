"""The course: Tables 1 to 4 as stored runs, exercises that tell what is wrong, labs with sliders, figures.

It stands on `drs_lib`, which is the paper and knows nothing of it.
"""

from drs_course.tables import reference_table, run_row, run_table, run_tables

__all__ = ["reference_table", "run_row", "run_table", "run_tables"]
