"""What a cold adapter costs: its own request, the others, and the store, over the whole suite.

The suite runs as processes on the CPU with the real model; adapters of about 40 MB lie on a real S3
server (SeaweedFS). The pool holds few of them and host memory a few more, so that each request's
tier is known; what counts is the tier that the suite itself reports. The kinds of request take
turns; the figures are medians.

First over loopback, the hard case: there a load waits for nothing but the cores that the prompt
and the others' tokens are computed on, because store, S3 server and worker share them. Then over
links of a limited rate between store and worker (`link`), where a load waits for bytes, as it does
between machines. "Hidden" is 1 - (cold - warm time to first token) / time of a load alone.
"""

from bench.coldstart.run import run

__all__ = ["run"]
