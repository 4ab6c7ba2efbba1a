from drs_lib.plots.stored import main

main()
