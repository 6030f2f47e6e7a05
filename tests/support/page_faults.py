"""A program that prints its page faults before and after freed memory is kept: [before, whether it is kept, after]."""

import json
import resource
import runpy
import sys

import torch


def faults_of_a_step():
    """Minor page faults where 128 MiB are taken, written to and freed, after nine times the same.

    The heap grows by aligned pieces until all of them fit into what was freed, which takes up to four rounds.

    Pieces of 64 MiB are mapped one by one, whatever threshold glibc has come to by itself.
    """
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(2**24) for _ in range(2)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if __name__ == "__main__":
    keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
    print(json.dumps([faults_of_a_step(), keep_freed_memory(), faults_of_a_step()]))
