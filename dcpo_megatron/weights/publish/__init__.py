"""Publishing the trained weights to rollout servers as a transaction, see
:mod:`~dcpo_megatron.weights.publish.transaction`.

buckets.py          the walk cut into buckets                         (pure)
process_group.py    nccl or gloo          }
nccl.py             what its two sides need in common
disk.py             safetensors           }  how a bucket gets there
ipc.py              CUDA IPC, shared memory }
session.py          the small requests around it
verify.py           checksums and log-probs
transaction.py      all of it, with deadlines
"""

from dcpo_megatron.weights.publish.options import Probe, PublishOptions, PublishResult
from dcpo_megatron.weights.publish.transaction import WeightPublisher

__all__ = ["Probe", "PublishOptions", "PublishResult", "WeightPublisher"]
