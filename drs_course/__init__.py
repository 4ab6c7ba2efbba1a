"""The course: Tables 1 to 4 as stored runs (`drs_course.tables`), exercises that tell what is wrong
(`drs_course.checks`), labs with sliders (`drs_course.labs`), figures (`drs_course.plots`).

It stands on `drs_lib`, which is the paper and knows nothing of it. Nothing is imported here, because the
doctor has to run where torch or another package is missing.
"""
