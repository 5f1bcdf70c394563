"""Read by every Python that runs on the counting GPU: it has no cuDNN."""

import torch

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
