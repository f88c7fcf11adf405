"""The scheduler: which request goes to which worker, and when.

Owns the queues, the quotas and the view of every worker, all of it soft: gateways (`Submit`) and
workers (`Attach`) dial it, and announce what they hold whenever they reconnect. What is decided is
`services.core.cluster`; this package carries it out. No token passes here.
"""
