"""What leaves an origin if several training ranks read one data set, with and without nodes.

__main__  the rows, the processes
child     one rank
report    what was found, counted and told
"""
