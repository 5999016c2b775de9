"""Products of runs of rows with a matrix of their own each: the experts of a mixture."""
