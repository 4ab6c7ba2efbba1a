from drs_course.plots.stored import main

main()
