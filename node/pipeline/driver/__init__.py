"""A generation as the node that was asked runs it; it need not run a stage itself.

plan         which node runs which shards: a pure function
generation   one answer: plans, attempts, replay after a lost stage
attempt      one session on the nodes of one plan, and how long the driver waits
text_stream  the bytes of tokens to text that can be shown; stop strings
"""
