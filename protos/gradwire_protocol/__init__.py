"""What every Gradwire service must do alike: the v1 contract, tensor frames, channels, errors.

Leaves devices, planning and the user's interface to the packages that build on it.
"""
