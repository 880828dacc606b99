"""Time of a piece of GPU work under load: as the Replay of bench/sm90/gemms.cu."""
import statistics

import torch

WARM, MEASURED, LEAST = 120e-3, 40e-3, 3  # seconds, seconds, replays


def seconds_of(work):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def median_microseconds(calls, warm=WARM, measured=MEASURED):
    """Microseconds of one of `calls`, which run one after another in a CUDA graph, replayed until the clocks have
    fallen to what the work sustains."""
    for call in calls:
        call()  # compiles and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    spent = 0.0
    while spent < warm:
        spent += seconds_of(graph.replay)
    times = []
    while sum(times) < measured or len(times) < LEAST:
        times.append(seconds_of(graph.replay))
    return statistics.median(times) * 1e6 / len(calls)
