"""The networks of the package `ofa`, with random weights everywhere."""

import torch


def build_peer(networks, name):
    """The package's network of that published name, with other weights than its own everywhere."""
    elastic = {"ks_list": [3, 5, 7], "expand_ratio_list": [3, 4, 6], "depth_list": [2, 3, 4], "dropout_rate": 0.0}
    if name == "ofa_supernet_resnet50":
        peer = networks.OFAResNets(
            depth_list=[0, 1, 2], expand_ratio_list=[0.2, 0.25, 0.35], width_mult_list=[0.65, 0.8, 1.0]
        )
    elif "proxyless" in name:
        peer = networks.OFAProxylessNASNets(width_mult=1.3, **elastic)
    else:
        peer = networks.OFAMobileNetV3(width_mult=float(name[-3:]), **elastic)
    return randomised(peer)


def randomised(network, seed=0):
    """Random weights of sane scale, transform matrices, norms and squeeze-excite biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("_matrix"):
                tensor.add_(0.1 * noise)
            elif name.endswith("running_var"):
                tensor.copy_(1.0 + 0.5 * noise.abs())
            elif ".se." in name and tensor.dim() == 4:
                tensor.copy_(noise * (0.1 / tensor[0].numel()) ** 0.5)  # gates that are neither shut nor open
            elif tensor.dim() == 4:
                tensor.copy_(noise * (2.0 / tensor[0].numel()) ** 0.5)
            elif tensor.dim() == 2:
                tensor.copy_(noise * (1.0 / tensor.shape[1]) ** 0.5)
            elif "bn" in name and name.endswith("weight"):
                tensor.copy_(1.0 + 0.2 * noise)
            else:
                tensor.copy_(0.1 * noise)
    return network.eval()


def activate(peer, subnet):
    peer.set_active_subnet(**{key: row for key, row in subnet.to_ofa().items() if key != "r"})


def images(side, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(side))
