"""Samples a second and the time to the first batch, of our data sets and of other libraries.

__main__  the rounds, the table
child     one contender, in a process of its own
ours      our data sets as contenders
peers     other libraries as contenders
"""
