"""Functions that run on the ranks of a pool."""

import torch
import torch.distributed as dist

ROWS = (3, 0, 5)  # rows of each rank's part


def gather_parts_of_different_sizes(noncontiguous: bool) -> torch.Tensor:
    """Every rank's rows of 10 x rank + row, gathered into one tensor."""
    rank = dist.get_rank()
    mine = 10.0 * rank + torch.arange(ROWS[rank]).float()[:, None].expand(-1, 2).contiguous()
    whole = torch.full((2, sum(ROWS)), -1.0).t() if noncontiguous else torch.full((sum(ROWS), 2), -1.0)
    dist.all_gather(list(whole.split(ROWS)), mine)
    return whole


def reduce_scatter_parts_of_different_sizes() -> tuple[torch.Tensor, bool]:
    """This rank's rows of the sum over ranks of (row + rank), and whether the input is as it was."""
    rank = dist.get_rank()
    given = torch.arange(sum(ROWS)).float()[:, None].expand(-1, 2).contiguous() + rank
    before = given.clone()
    mine = torch.empty(ROWS[rank], 2)
    dist.reduce_scatter(mine, list(given.split(ROWS)))
    return mine, torch.equal(given, before)
