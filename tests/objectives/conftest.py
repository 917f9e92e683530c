import torch
from hypothesis import settings

torch.set_num_threads(1)
# Machines may be shared: an example has no deadline. Failing examples are printed, not stored.
settings.register_profile("mathematics", deadline=None, database=None)
settings.load_profile("mathematics")
