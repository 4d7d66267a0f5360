"""The Open Inference Protocol over gRPC: its definition, the code made of it, and what Serve calls (`service`).

Only replicas and Serve's proxies import the code that is made: Triton's client registers messages of the same names,
and a process can have them only once. No name here is for the HTTP side, which is in `dialects`.
"""
