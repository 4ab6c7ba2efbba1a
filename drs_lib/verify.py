def verify(**k): pass
