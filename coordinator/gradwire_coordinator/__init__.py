"""The coordinator: knows the servers, plans runs, and dispatches their entries.

Leaves devices and tensors to the stage servers, batches and weights to the client; imports no torch.
"""
