"""The script that stock torchrun runs here: all-reduces whose sum shows the world. Started as `all_reduce.py RESULTS STEPS`.

In a world of two it repeats until it is disturbed; in a world of one it makes STEPS sums and ends. Rank 0
appends a line `world sum` to RESULTS for each; the sum shows that every worker took part.
"""

import sys

import torch
import torch.distributed as dist


def main(results: str, steps: int) -> None:
    """Worker process of torchrun."""
    dist.init_process_group("gloo")
    world, done = dist.get_world_size(), 0
    while world > 1 or done < steps:
        total = torch.tensor(2.0 ** dist.get_rank())
        dist.all_reduce(total)
        done += 1
        if dist.get_rank() == 0:
            with open(results, "a", encoding="utf-8") as file:
                file.write(f"{world} {int(total)}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
