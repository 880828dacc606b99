"""Time of a piece of GPU work: as the Replay of bench/sm90/gemms.cu."""
import statistics
import time

import torch

WARM, MEASURED, LEAST = 120e-3, 40e-3, 3  # seconds, seconds, replays
REST, RESTED = 15e-3, 12  # seconds before each of so many replays


def seconds_of(work):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def median_microseconds(calls, warm=WARM, measured=MEASURED, rested=False):
    """Microseconds of one of `calls`, which run one after another in a CUDA graph, replayed until the clocks have
    fallen to what the work sustains; or, rested, with a pause before each replay."""
    for call in calls:
        call()  # compiles and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    if rested:
        times = []
        for _ in range(RESTED):
            time.sleep(REST)
            times.append(seconds_of(graph.replay))
        return statistics.median(times) * 1e6 / len(calls)
    spent = 0.0
    while spent < warm:
        spent += seconds_of(graph.replay)
    times = []
    while sum(times) < measured or len(times) < LEAST:
        times.append(seconds_of(graph.replay))
    return statistics.median(times) * 1e6 / len(calls)
