"""The transport's protocol. No module here does I/O, and each takes the time as an argument.

exchange       all channels of an endpoint: routing, keys, time
channel_table  which channels are open, what is queued for their peers, how they end
sender         the outlet's half of a channel: credits, resending, a lost peer
receiver       the inbox's half of a channel: order, whole tensors, acknowledgements
messages       peers, ends of channels, outgoing messages, events
wire           the header of a message, as bytes and back
"""
