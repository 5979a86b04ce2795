"Chapter 05: trees of files that stand for machines which are not here, a made-up NVML, the true kernel where it can be asked, and ranks that are slow because they do more work."
import configparser
import inspect
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llm_scratch import infrastructure as infra
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.core import UserError
from llm_scratch.infrastructure import (
    ANCESTORS, EXTRAS, PROGRAMS, REASONS, SAMPLED, SAMPLED_PER_GPU, SLOWING, AllReduceTime, Cpu, Gpu, HardwareReport, HardwareSampler, Matmul, MainMemory, NvmeDrive, Component, Preflight, Roofline, decoder_matmuls,
    disk_speed, doctor_rows, hardware_findings, hardware_report, installed_components, local_preflight, matmul_peak, matmul_seconds, measured_rows, neighbour_rounds, open_nvml, pcie_bandwidth, preflight, preflight_text,
    read_cpu, read_gpus, read_memory, read_network, slow_ranks, stream_bytes, throttle_reasons, time_all_reduce, triad_bandwidth)

ROOT = Path(__file__).resolve().parent.parent
REAL = Path("/proc/self/status").exists()


def grow(root:Path, files:dict[str, str])->Path:
    "A folder that stands for a machine."
    for path, text in files.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        (root/path).write_text(text + "\n", encoding="utf-8")
    return root


def x86(n:int, model:str, flags:str)->str:
    return "".join(f"processor\t: {i}\nvendor_id\t: Example\nmodel name\t: {model}\nflags\t\t: fpu sse2 {flags}\npower management:\n\n" for i in range(n))


def eight_a100(root:Path)->Path:
    "A DGX A100 as the kernel shows it: 2 sockets, 128 cores, a last cache for every 4 cores, 8 HCAs for computing and one that is down, 4 drives, two of them wrong."
    files = {"proc/cpuinfo": x86(128, "AMD EPYC 7742 64-Core Processor", "avx2"), "proc/self/status": "Name:\tpython\nCpus_allowed:\tffffffff\nCpus_allowed_list:\t0-127\nMems_allowed_list:\t0-1",
             "proc/self/cgroup": "0::/user.slice", "sys/fs/cgroup/user.slice/cpu.max": "max 100000", "sys/fs/cgroup/user.slice/memory.max": "max",
             "proc/meminfo": "MemTotal:       1056759044 kB\nMemFree:        900000000 kB\nMemAvailable:   1000000000 kB", "sys/devices/system/cpu/online": "0-127",
             "sys/devices/system/node/node0/cpulist": "0-63", "sys/devices/system/node/node1/cpulist": "64-127", "sys/class/net/bonding_masters": "bond0",
             "proc/mounts": "overlay / overlay rw 0 0\n/dev/md0 /raid ext4 rw 0 0\n/dev/nvme0n1 /raid/scratch xfs rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0"}
    for i in range(128):
        for index, level, size, shared in ((0, 1, "32K", str(i)), (1, 1, "32K", str(i)), (2, 2, "512K", str(i)), (3, 3, "16384K", f"{i//4*4}-{i//4*4+3}")):
            at = f"sys/devices/system/cpu/cpu{i}/cache/index{index}"
            files |= {f"{at}/level": str(level), f"{at}/size": size, f"{at}/shared_cpu_list": shared}
    for i in range(11):
        port = f"sys/class/infiniband/mlx5_{i}/ports/1"
        up = i != 10
        files |= {f"{port}/state": "4: ACTIVE" if up else "1: DOWN", f"{port}/phys_state": "5: LinkUp" if up else "3: Disabled", f"{port}/rate": "200 Gb/sec (4X HDR)" if up else "10 Gb/sec (4X SDR)", f"{port}/link_layer": "InfiniBand",
                  f"sys/class/infiniband/mlx5_{i}/device/numa_node": str(i//5), f"{port}/counters/port_xmit_data": str(1000+i), f"{port}/counters/port_rcv_data": str(500+i), f"{port}/counters/symbol_error": "0",
                  f"{port}/counters/link_downed": str(2*(i == 3))}
    for i in range(11):
        drive = f"sys/class/nvme/nvme{i}"
        files |= {f"{drive}/model": "SAMSUNG MZWLJ3T8HBLS-00007 ", f"{drive}/device/current_link_speed": "16.0 GT/s PCIe", f"{drive}/device/current_link_width": "2" if i == 7 else "4", f"{drive}/device/numa_node": "-1",
                  f"sys/block/nvme{i}n1/size": "7501476528", f"sys/block/nvme{i}n2/size": "8", f"sys/block/nvme{i}c0n1/size": "7501476528"}
    for i in range(8): files[f"sys/bus/pci/devices/0000:{bus(i)}:00.0/numa_node"] = str(i//4)
    files |= {"sys/class/net/ib0/operstate": "up", "sys/class/net/ib0/speed": "200000", "sys/class/net/ib0/type": "32", "sys/class/net/ib0/device/vendor": "0x15b3",
              "sys/class/net/eth0/operstate": "up", "sys/class/net/eth0/speed": "-1", "sys/class/net/eth0/type": "1", "sys/class/net/eth0/statistics/tx_bytes": "77", "sys/class/net/eth0/statistics/rx_bytes": "88",
              "sys/class/net/docker0/operstate": "down", "sys/class/net/docker0/speed": "10000", "sys/class/net/lo/operstate": "unknown", "sys/class/net/lo/type": "772"}
    return grow(root, files)


def laptop(root:Path)->Path:
    "8 cores, one drive, a wireless card that does not tell its speed; no cgroup file, no NUMA folder, no caches told."
    return grow(root, {"proc/cpuinfo": x86(8, "12th Gen Example", "avx2 avx512f_not_this"), "proc/self/status": "Cpus_allowed_list:\t0-7", "proc/self/cgroup": "0::/user.slice/session.scope",
                       "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB", "sys/class/nvme/nvme0/model": "WD 1TB", "sys/class/nvme/nvme0/device/current_link_speed": "8.0 GT/s PCIe",
                       "sys/class/nvme/nvme0/device/current_link_width": "4", "sys/block/nvme0n1/size": "1953525168", "sys/class/net/wlan0/operstate": "up", "sys/class/net/wlan0/type": "1", "sys/class/net/wlan0/device/x": "1"})


# --- a made-up NVML --------------------------------------------------------------------------------------------------------

class Refused(Exception): pass


def bus(i:int)->str: return ("07", "0f", "47", "4e", "87", "90", "b7", "bd")[i]


class Nvml:
    "Eight A100 on switches, in the words of NVML; `refuses` names questions that it does not answer, `down` links that are not up, `reasons` why cards are slow."
    NVMLError = Refused
    NVML_NVLINK_MAX_LINKS, NVML_NVLINK_DEVICE_TYPE_SWITCH, NVML_TEMPERATURE_GPU = 18, 2, 0

    def __init__(self, n=8, refuses=(), down=(), reasons=None, switches=True, bytes_=False):
        self.n, self.down, self.reasons, self.switches, self.bytes, self.starts, self.stops = n, set(down), reasons or {}, switches, bytes_, 0, 0
        for name in refuses: setattr(self, name, self.refuse)
    def refuse(self, *args): raise Refused("not supported")
    def name(self, text): return text.encode() if self.bytes else text
    def nvmlInit(self): self.starts += 1
    def nvmlShutdown(self): self.stops += 1
    def nvmlDeviceGetCount(self): return self.n
    def nvmlDeviceGetHandleByIndex(self, index): return index
    def nvmlDeviceGetName(self, handle): return self.name("NVIDIA A100-SXM4-80GB")
    def nvmlDeviceGetPciInfo(self, handle): return SimpleNamespace(busId=self.name(f"00000000:{bus(handle).upper()}:00.0"))
    def nvmlDeviceGetMemoryInfo(self, handle): return SimpleNamespace(total=80*2**30, used=(10+handle)*2**30, free=0)
    def nvmlDeviceGetEnforcedPowerLimit(self, handle): return 400_000
    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle): return 1
    def nvmlDeviceGetCurrPcieLinkWidth(self, handle): return 8 if handle == 5 else 16
    def nvmlDeviceGetMaxPcieLinkWidth(self, handle): return 16
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle): return self.reasons.get(handle, 1)
    def nvmlDeviceGetNvLinkState(self, device, link):
        if link >= 12: raise Refused("invalid argument")
        return int((device, link) not in self.down)
    def nvmlDeviceGetNvLinkRemoteDeviceType(self, device, link):
        assert (device, link) not in self.down, "nobody asks where a link leads that is down"
        return 2 if self.switches else 0
    def nvmlDeviceGetNvLinkRemotePciInfo(self, device, link):
        if self.switches: return SimpleNamespace(busId=self.name(f"00000000:C{link%6}:00.0"))
        others = [i for i in range(self.n) if i != device]
        return self.nvmlDeviceGetPciInfo(others[link%len(others)])
    def nvmlDeviceGetTopologyCommonAncestor(self, device1, device2): return 20 if device1//2 == device2//2 else 40 if device1//4 == device2//4 else 50
    def nvmlDeviceGetUtilizationRates(self, handle): return SimpleNamespace(gpu=90, memory=40)
    def nvmlDeviceGetPowerUsage(self, handle): return 250_500
    def nvmlDeviceGetTemperature(self, handle, sensor): return 50+handle


def test_the_made_up_nvml_speaks_like_the_true_one():
    true = pytest.importorskip("pynvml")
    for name in [n for n in vars(Nvml) if n.startswith("nvml")]:
        ours, theirs = (len(inspect.signature(f).parameters) for f in (getattr(Nvml(), name), getattr(true, name)))
        optional = sum(p.default is not inspect.Parameter.empty or p.kind is p.VAR_POSITIONAL for p in inspect.signature(getattr(true, name)).parameters.values())
        assert theirs-optional <= ours <= theirs, name
    for name in ("NVML_NVLINK_DEVICE_TYPE_SWITCH", "NVML_TEMPERATURE_GPU"): assert getattr(Nvml, name) == getattr(true, name), name
    assert true.NVML_NVLINK_MAX_LINKS >= Nvml.NVML_NVLINK_MAX_LINKS # 18, and 36 in versions that know later cards
    assert issubclass(true.NVMLError, Exception)
    called = set(re.findall(r'"(nvml\w+)"|nvml\.(nvml\w+|NVML\w+)', inspect.getsource(infra)))
    assert all(hasattr(true, a or b) and hasattr(Nvml(), a or b) for a, b in called) and len(called) > 15


def test_reasons_and_ancestors_are_those_of_nvml():
    true = pytest.importorskip("pynvml")
    bits = dict(GpuIdle=1, ApplicationsClocksSetting=2, SwPowerCap=4, HwSlowdown=8, SyncBoost=16, SwThermalSlowdown=32, HwThermalSlowdown=64, HwPowerBrakeSlowdown=128, DisplayClockSetting=256)
    assert {getattr(true, f"nvmlClocksThrottleReason{n}") for n in bits} == set(REASONS) and all(getattr(true, f"nvmlClocksThrottleReason{n}") == b for n, b in bits.items())
    assert {true.NVML_TOPOLOGY_INTERNAL, true.NVML_TOPOLOGY_SINGLE, true.NVML_TOPOLOGY_MULTIPLE, true.NVML_TOPOLOGY_HOSTBRIDGE, true.NVML_TOPOLOGY_NODE, true.NVML_TOPOLOGY_SYSTEM} == set(ANCESTORS)
    assert throttle_reasons(1|2|16|256) == () and throttle_reasons(0) == ()
    assert [throttle_reasons(1|b) for b in SLOWING] == [(REASONS[b],) for b in SLOWING]
    assert throttle_reasons(4|64) == ("power limit", "heat, by hardware")


@pytest.fixture
def use(monkeypatch):
    "Put a module, or nothing, where `import` finds it."
    def put(name, module): monkeypatch.setitem(sys.modules, name, module); return module
    return put


def test_nvml_is_missing_or_finds_no_driver(use):
    use("pynvml", None)
    assert open_nvml() is None and read_gpus(None) == ([], {})
    use("pynvml", Nvml(refuses=["nvmlInit"]))
    assert open_nvml() is None
    good = use("pynvml", Nvml())
    assert open_nvml() is good and good.starts == 1


def test_the_report_of_eight_a100(tmp_path, use):
    nvml = use("pynvml", Nvml(reasons={2: 1|4|64}, down=[(3, 7)]))
    r = hardware_report(eight_a100(tmp_path))
    assert (nvml.starts, nvml.stops) == (1, 1)
    assert r.cpu == Cpu("AMD EPYC 7742 64-Core Processor", ("avx2",), 128, 128, None, 32*16*2**20, (tuple(range(64)), tuple(range(64, 128))))
    assert r.memory == MainMemory(1056759044*1024, 1000000000*1024, None) and r.memory.usable == r.memory.total
    assert r.gpus[5] == Gpu("NVIDIA A100-SXM4-80GB", "0000:90:00.0", 80*2**30, 400., 1, 8, 16, 12, 12, (), 1)
    assert [g.nvlinks for g in r.gpus] == [12, 12, 12, 11, 12, 12, 12, 12] and {g.max_nvlinks for g in r.gpus} == {12}
    assert [g.numa for g in r.gpus] == [0]*4 + [1]*4 and [g.throttled for g in r.gpus].index(("power limit", "heat, by hardware")) == 2
    assert len(r.joined) == 28 and {pair for pair, way in r.joined.items() if way == "NV11"} == {tuple(sorted((3, i))) for i in range(8) if i != 3} and set(r.joined.values()) == {"NV11", "NV12"}
    assert [d.name for d in r.nvme] == [f"nvme{i}" for i in range(11)] # 10 behind 9
    assert r.nvme[1] == NvmeDrive("nvme1", "SAMSUNG MZWLJ3T8HBLS-00007", 512*(7501476528+8), 4, 4, None)
    assert [p.device for p in r.infiniband] == [f"mlx5_{i}" for i in range(11)]
    p = r.infiniband[3]
    assert (p.port, p.state, p.bits_per_second, p.link, p.numa, p.sent, p.received, p.errors) == (1, "ACTIVE", 200e9, "InfiniBand", 0, 4*1003, 4*503, (("link_downed", 2),))
    assert r.infiniband[10].state == "DOWN" and r.infiniband[0].errors == ()
    assert {i.name: (i.is_up, i.bits_per_second, i.is_hardware) for i in r.network} == {"ib0": (True, 200e9, True), "eth0": (True, None, False), "docker0": (False, 10e9, False)}
    assert next(i for i in r.network if i.name == "eth0").sent == 77 and next(i for i in r.network if i.name == "eth0").received == 88
    found = hardware_findings(r, n_threads=128)
    assert [f.partition(":")[0] for f in found] == ["gpu 2 is slowed by power limit and heat, by hardware", "gpu 3 has 11 of 12 NVLinks up", "gpu 5 uses 8 of 16 PCI lanes", "nvme7 uses 2 PCI lanes where a drive has 4",
                                                    "mlx5_3 port 1 has errors", "mlx5_10 port 1 is DOWN, not ACTIVE"]
    rows = dict(doctor_rows(r))
    assert "128 usable: 128 in the machine" in rows["cores"] and "no quota" in rows["cores"] and "512.0 MiB of last cache; 2 NUMA nodes" in rows["cpu"]
    assert rows["gpu 7"] == "NVIDIA A100-SXM4-80GB, 80.0 GiB, 400 W, PCI generation 1 with 16 lanes, 12 of 12 NVLinks, node 1"
    assert "200 Gbit/s" in rows["mlx5_0 port 1"] and "3,840.8 GB" in rows["nvme0"] and rows["ib0"] == "up, 200 Gbit/s" and rows["eth0"] == "up, unknown speed" and "docker0" not in rows
    joined = [much for what, much in doctor_rows(r) if what == "gpus joined"]
    assert len(joined) == 2 and any(j.startswith("NV11: 0-3 1-3 2-3 3-4") for j in joined)
    assert "gpus" not in rows and "nvme" not in rows and "infiniband" not in rows


def test_cards_joined_directly_and_not_at_all(use):
    direct = read_gpus(Nvml(n=4, switches=False))[1] # 12 links to 3 others: 4 for each pair
    assert set(direct.values()) == {"NV4"} and len(direct) == 6
    without = read_gpus(Nvml(n=8, refuses=["nvmlDeviceGetNvLinkState"]))
    assert without[1][0, 1] == "PXB" and without[1][0, 2] == "NODE" and without[1][0, 7] == "SYS" and {g.max_nvlinks for g in without[0]} == {0}
    silent = read_gpus(Nvml(n=2, refuses=["nvmlDeviceGetNvLinkState", "nvmlDeviceGetTopologyCommonAncestor"]))[1]
    assert silent == {(0, 1): "unknown"}
    cards = read_gpus(Nvml(n=2, down=[(i, link) for i in range(2) for link in range(12)]))[0] # without a bridge no link is up, and that is no fault
    assert not any("NVLink" in f for f in hardware_findings(HardwareReport(Cpu("", (), 1, 1, None, 0, ()), MainMemory(1, 1, None), cards, {}, [], [], []), 1))
    one_dark = read_gpus(Nvml(n=2, down=[(1, link) for link in range(12)]))[0]
    assert any("gpu 1 has 0 of 12" in f for f in hardware_findings(HardwareReport(Cpu("", (), 1, 1, None, 0, ()), MainMemory(1, 1, None), one_dark, {}, [], [], []), 1))


def test_a_card_that_refuses_everything_is_still_listed(tmp_path, use):
    questions = [n for n in vars(Nvml) if n.startswith("nvmlDeviceGet") and n not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")]
    gpus, joined = read_gpus(Nvml(n=2, refuses=questions), tmp_path)
    assert gpus == [Gpu("unknown", "", None, None, None, None, None, 0, 0, (), None)]*2 and joined == {(0, 1): "unknown"}
    use("pynvml", Nvml(n=2, refuses=questions))
    rows = dict(doctor_rows(hardware_report(tmp_path)))
    assert rows["gpu 1"] == "unknown, unknown, unknown power, PCI generation ? with ? lanes, 0 of 0 NVLinks"
    assert read_gpus(Nvml(n=2, refuses=["nvmlDeviceGetHandleByIndex"])) == ([], {}) and read_gpus(Nvml(refuses=["nvmlDeviceGetCount"])) == ([], {})


def test_older_versions_answer_in_bytes():
    assert read_gpus(Nvml(bytes_=True)) == read_gpus(Nvml())


def test_nvml_is_let_go_when_reading_fails(tmp_path, use, monkeypatch):
    nvml = use("pynvml", Nvml())
    def broken(*args): raise ZeroDivisionError
    monkeypatch.setattr(nvml, "nvmlDeviceGetPciInfo", broken)
    with pytest.raises(ZeroDivisionError): hardware_report(tmp_path) # what is our mistake is not hidden
    assert nvml.stops == 1


# --- files of the kernel -------------------------------------------------------------------------------------------------------

def test_the_report_of_a_laptop_and_of_nothing(tmp_path, use):
    use("pynvml", None)
    r = hardware_report(laptop(tmp_path/"laptop"))
    assert r.cpu == Cpu("12th Gen Example", ("avx2",), 8, 8, None, 0, ()) and r.memory == MainMemory(16000000*1024, 9000000*1024, None)
    assert r.nvme == [NvmeDrive("nvme0", "WD 1TB", 512*1953525168, 3, 4, None)] and r.infiniband == [] and r.gpus == []
    assert [(i.name, i.is_up, i.bits_per_second, i.is_hardware) for i in r.network] == [("wlan0", True, None, True)]
    rows = dict(doctor_rows(r))
    assert rows["gpus"] == rows["infiniband"] == "none found" and "unknown of last cache; 1 NUMA node" in rows["cpu"] and hardware_findings(r, 8) == []
    bare = hardware_report(tmp_path/"nothing")
    assert bare.cpu.cores == (os.cpu_count() or 1) == bare.cpu.allowed and bare.memory.total > 0 and bare.cpu.model == "unknown"


def test_an_arm_server(tmp_path):
    cpu = read_cpu(grow(tmp_path, {"proc/cpuinfo": "".join(f"processor\t: {i}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve i8mm bf16\nCPU part\t: 0xd40\n\n" for i in range(3)), "proc/self/status": "Cpus_allowed_list:\t1"}))
    assert cpu.features == ("asimd", "sve", "bf16", "i8mm") and cpu.cores == 3 and cpu.allowed == 1 and cpu.usable == 1


@pytest.mark.parametrize("files, quota, limit", [
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000", "sys/fs/cgroup/memory.max": "1000000"}, 2., 1000000), # version 2, seen from inside
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "50000 100000", "sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": "5000"}, .5, 5000), # the outer one binds
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "30000 10000", "sys/fs/cgroup/a/cpu.max": "800000 100000"}, 3., None), # the inner one binds, with a period of its own
    ({"proc/self/cgroup": "0::/../../other", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5, None), # a group that lies outside of what this container sees
    ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/ab/cpu.max": "1000 100000"}, None, None), # somebody else's
    ({"proc/self/cgroup": "5:cpu,cpuacct:/docker/77\n4:memory:/docker/77", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000"}, 4., 2000), # version 1, in a container
    ({"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712"}, None, None), # no limit
    ({"proc/self/cgroup": "3:cpuset:/x\n0::/x", "sys/fs/cgroup/unified/x/cpu.max": "100000 100000", "sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us": "7", "sys/fs/cgroup/cpuset/x/cpu.cfs_period_us": "7000"}, 1., None), # both versions, another controller
])
def test_quotas_of_both_versions(tmp_path, files, quota, limit):
    root = grow(tmp_path, files | {"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 900000 kB", "proc/cpuinfo": x86(64, "x", "avx2"), "proc/self/status": "Cpus_allowed_list:\t0-31"})
    assert (read_cpu(root).quota, read_memory(root).limit) == (quota, limit)
    assert read_cpu(root).usable == (quota or 32) and read_memory(root).usable == (limit or 1000000*1024)
    found = hardware_findings(HardwareReport(read_cpu(root), read_memory(root), [], {}, [], [], []), n_threads=32)
    assert any("torch uses 32 threads" in f and f"OMP_NUM_THREADS={max(1, int(quota or 32))}" in f for f in found) == (quota is not None) and any("killed beyond" in f for f in found) == (limit is not None)


def test_cores_that_are_offline_are_not_counted(tmp_path):
    root = grow(tmp_path, {"proc/cpuinfo": x86(2, "x", "avx2"), "proc/self/status": "Cpus_allowed_list:\t0-127", "sys/devices/system/cpu/online": "0-1"})
    assert read_cpu(root).allowed == 2


@settings(deadline=None)
@given(st.sets(st.integers(0, 300)))
def test_the_short_form_of_a_set_is_read(ids):
    runs = []
    for i in sorted(ids):
        if runs and runs[-1][1] == i-1: runs[-1][1] = i
        else: runs.append([i, i])
    assert infra._ids(",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)) == tuple(sorted(ids))


@settings(deadline=None)
@given(allowed=st.integers(1, 256), quota=st.none() | st.floats(.01, 300), n=st.integers(1, 64))
def test_threads_never_exceed_what_is_usable(allowed, quota, n):
    cpu = Cpu("", (), 256, allowed, quota, 0, ())
    assert cpu.usable == (allowed if quota is None else min(allowed, quota)) and cpu.threads(n) >= 1
    assert cpu.threads(n) == 1 or cpu.threads(n)*n <= cpu.usable < (cpu.threads(n)+1)*n


@pytest.mark.skipif(not REAL, reason="no /proc on this system")
def test_this_machine_is_read_as_others_read_it():
    cpu, memory = read_cpu(), read_memory()
    assert cpu.cores == os.cpu_count() and cpu.allowed == len(os.sched_getaffinity(0)) and memory.total == psutil.virtual_memory().total and 0 < memory.available <= memory.total
    ours = {i.name for i in read_network()}
    assert ours == {n for n in psutil.net_if_addrs() if n != "lo"} | ours and "lo" not in ours
    code = "import os; os.sched_setaffinity(0, [max(os.sched_getaffinity(0))]); from llm_scratch.infrastructure import read_cpu; print(read_cpu().allowed)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["1"], done.stderr


@pytest.fixture
def confined():
    "A cgroup of our own that gives 1.5 cores' worth of time; version 1 or 2."
    if os.geteuid(): pytest.skip("making a cgroup needs root")
    top = next((p for p in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")) if (p/"cgroup.procs").exists()), None)
    group = top and top/f"llms_infra_{os.getpid()}"
    try: group.mkdir()
    except (AttributeError, OSError) as e: pytest.skip(f"no cgroup can be made here: {e}")
    try:
        if (group/"cpu.cfs_quota_us").exists(): (group/"cpu.cfs_quota_us").write_text("150000"), (group/"cpu.cfs_period_us").write_text("100000")
        elif (group/"cpu.max").exists(): (group/"cpu.max").write_text("150000 100000")
        else: pytest.skip("the cpu controller is not handed down to new cgroups here")
        yield group
    finally:
        for _ in range(100):
            try: group.rmdir(); break
            except OSError: time.sleep(.1)


def test_torch_does_not_look_at_a_quota(confined):
    code = """import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
import torch
from llm_scratch.infrastructure import read_cpu
cpu = read_cpu()
print(torch.get_num_threads(), cpu.quota, cpu.threads())"""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")} | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, str(confined)], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    threads, quota, ours = done.stdout.split()
    cores = len(os.sched_getaffinity(0))
    assert int(threads) == cores and 0 < float(quota) <= 1.5 and int(ours) == max(1, int(min(cores, float(quota)))) # a group around ours may be tighter


def test_pcie_after_its_line_code():
    assert [round(pcie_bandwidth(g, 1)/1e6) for g in range(1, 7)] == [250, 500, 985, 1969, 3938, 7562]
    assert pcie_bandwidth(4, 16) == 16*pcie_bandwidth(4, 1)


# --- the two ceilings -----------------------------------------------------------------------------------------------------------

def test_bytes_and_operations_are_counted_right(monkeypatch):
    "With a clock that says what we want; the products are counted by torch."
    monkeypatch.setattr(infra, "_times", lambda work, rounds, device: work() is None or [4., 2., 3.])
    assert triad_bandwidth(4096) == 3*4096/2 and matmul_peak(n=64) == 2*64**3/2 and matmul_seconds(n=8) == 3
    with FlopCounterMode(display=False) as c: matmul_peak(torch.bfloat16, n=32)
    assert c.get_total_flops() == 2*32**3


def test_work_is_done_once_for_free_and_timed_afterwards():
    calls = []
    took = infra._times(lambda: calls.append("work"), 3, "cpu", ready=lambda: (calls.append("ready"), time.sleep(.05)))
    assert calls == ["work", *["ready", "work"]*3] and len(took) == 3 and min(took) < .05 # nobody is timed while he gets ready


@settings(deadline=None)
@given(st.floats(1e6, 1e15), st.floats(1e6, 1e15), st.floats(1, 1e12), st.floats(1, 1e12))
def test_laws_of_the_roofline(bandwidth, peak, flop, n_bytes):
    r = Roofline(bandwidth, peak)
    assert r.seconds(flop, n_bytes) == pytest.approx(flop/r.attainable(flop/n_bytes))
    assert r.attainable(r.ridge) == pytest.approx(peak) and r.attainable(r.ridge/2) == pytest.approx(peak/2) and r.attainable(2*r.ridge) == peak
    assert r.seconds(flop, 0) == flop/peak and r.seconds(0, n_bytes) == n_bytes/bandwidth


def test_every_product_of_a_decoder_is_listed():
    cfg = ModelConfig(vocab_size=77, context_len=16, n_layers=3, n_heads=4, n_kv_heads=2, d_model=24, d_ff=40, d_head=6)
    mine = {"logits": [(24, 77)]}
    for name, w in Decoder(cfg).named_parameters():
        if w.ndim == 2 and "embed" not in name: mine.setdefault(name.split(".")[-2].removesuffix("_proj"), []).append(tuple(reversed(w.shape)))
    assert {m.name: [(m.inner, m.columns)]*m.times for m in decoder_matmuls(cfg, 5)} == mine
    assert Matmul("x", 2, 3, 5, 7).flop == 7*60 and Matmul("x", 2, 3, 5, 7).numbers == 7*(6+15+10) and Matmul("x", 2, 3, 5, 7).intensity(2) == 60/62


def test_rows_are_longer_than_the_cache_and_fit():
    cpu = lambda cache: Cpu("", (), 1, 1, None, cache, ())
    assert stream_bytes(cpu(2**25), MainMemory(2**40, 2**40, None)) == 2**27 and stream_bytes(cpu(0), MainMemory(2**40, 2**40, None)) == 2**26
    assert stream_bytes(cpu(2**30), MainMemory(2**30, 2**28+4, None)) == 2**25


# --- the drive ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("n", [0, 1, 4096, 3*65536, 3*65536+5])
def test_what_was_written_is_read(tmp_path, direct, n):
    path, content = tmp_path/"file", os.urandom(n)
    path.write_bytes(content)
    how, blocks = infra._read_uncached(path, 65536, direct)
    assert b"".join(bytes(b) for b in blocks) == content and how in ("O_DIRECT", "posix_fadvise", "page cache") and (direct or how != "O_DIRECT")
    assert not any("file" in f.path and str(tmp_path) in f.path for f in psutil.Process().open_files())


def test_the_speed_of_a_drive(tmp_path, monkeypatch):
    clock = iter((10., 12., 100., 104.))
    monkeypatch.setattr(infra.time, "perf_counter", lambda: next(clock))
    synced = []
    monkeypatch.setattr(infra.os, "fsync", lambda fd, real=os.fsync: (synced.append(os.fstat(fd).st_size), real(fd)))
    s = disk_speed(tmp_path, n_bytes=2**20, block=2**16)
    assert (s.write, s.read) == (2**20/2, 2**20/4) and list(tmp_path.iterdir()) == [] and synced == [2**20]
    if REAL: assert s.filesystem == psutil_filesystem(tmp_path)


def psutil_filesystem(folder:Path)->str: return max((p for p in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(p.mountpoint)), key=lambda p: len(p.mountpoint)).fstype


def test_a_drive_that_is_memory_or_full_or_lies(tmp_path, monkeypatch):
    if os.access("/dev/shm", os.W_OK): assert disk_speed("/dev/shm", n_bytes=2**20, block=2**18).filesystem == "tmpfs"
    with monkeypatch.context() as m:
        m.setattr(infra.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2*2**20-1))
        with pytest.raises(UserError, match="2 MB free: a test with 1 MB wants twice as much, give another folder or fewer bytes"): disk_speed(tmp_path, n_bytes=2**20)
    monkeypatch.setattr(infra, "_read_uncached", lambda path, block: ("O_DIRECT", iter([b"x"*17])))
    with pytest.raises(OSError, match="17 of 1048576"): disk_speed(tmp_path, n_bytes=2**20)
    assert list(tmp_path.iterdir()) == []


def test_the_innermost_file_system(tmp_path):
    root = eight_a100(tmp_path)
    assert [infra._filesystem(Path(p), root) for p in ("/home", "/raid", "/raid/x", "/raid/scratch/y", "/raidx", "/dev/shm")] == ["overlay", "ext4", "ext4", "xfs", "overlay", "tmpfs"]
    assert infra._filesystem(Path("/x"), tmp_path/"none") == ""
    assert infra._filesystem(Path("/a"), grow(tmp_path/"twice", {"proc/mounts": "w /a/b tmpfs rw\nx / ext4 rw\ny /a xfs rw\nz /a nfs4 rw"})) == "nfs4"
    assert infra._filesystem(Path("/a/b"), tmp_path/"twice") == "tmpfs"


# --- doctor -----------------------------------------------------------------------------------------------------------------------

def test_missing_pieces_say_what_they_would_give(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy", "torch>=1.0; extra == 'fast'", "no-such-package>=3; extra == 'monitor'", "psutil>=999; extra == 'monitor'", "numpy; extra == 'new'"])
    monkeypatch.setattr(infra.shutil, "which", lambda name: "/usr/bin/ssh" if name == "ssh" else None)
    pieces = {p.name: p for p in installed_components()}
    assert pieces["extra fast"].missing == "" and pieces["extra fast"].line == "installed" and pieces["extra new"].line == "installed"
    assert pieces["extra monitor"].line == f"pip install 'llm_scratch[monitor]' adds no-such-package>=3, psutil>=999; gives {EXTRAS['monitor']}"
    assert pieces["program ssh"].line == "installed" and pieces["program pdsh"].line == f"not found; gives {PROGRAMS['pdsh']}"
    assert Component("x", "gone", "").line == "gone"


def test_the_doctor_works_where_the_library_is_not_installed(monkeypatch):
    from importlib.metadata import PackageNotFoundError
    def gone(name): raise PackageNotFoundError(name)
    monkeypatch.setattr("importlib.metadata.requires", gone)
    names = {p.name for p in installed_components()}
    assert "torch with CUDA" in names and not any(name.startswith("extra") for name in names)


def test_every_extra_of_the_library_is_explained():
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    extras = {k.removesuffix("_requirements") for k in ini["DEFAULT"] if k.endswith("_requirements")}
    assert extras and extras <= set(EXTRAS)


def test_the_doctor_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_CACHE", str(tmp_path/"cache"))
    rows = doctor_rows(hardware_report(), tmp_path)
    table = dict(rows)
    assert {"python", "torch", "cpu", "cores", "memory", "disk", "cache", "torch with gloo", "torch with NCCL", "program tc"} <= set(table) and all(isinstance(x, str) and x for row in rows for x in row)
    assert table["cache"] == f"{tmp_path/'cache'}: no source yet" and table["torch"].startswith(torch.__version__)
    monkeypatch.setattr(infra, "stream_bytes", lambda cpu, memory: 2**16)
    monkeypatch.setattr(infra, "matmul_peak", lambda dtype, n=8: {torch.float32: 100e9, torch.bfloat16: 400e9}[dtype])
    monkeypatch.setattr(infra, "triad_bandwidth", lambda n: 50e9)
    measured = dict(measured_rows(hardware_report(), tmp_path))
    assert measured["memory speed"].startswith("50.0 GB/s") and measured["float32 products"] == "100 GFLOP/s, ridge at 2.0 FLOP per byte" and measured["bfloat16 products"] == "400 GFLOP/s, ridge at 8.0 FLOP per byte"
    assert "MB/s written" in measured["disk speed"]


# --- the sampler --------------------------------------------------------------------------------------------------------------------

def sampler(root=Path("/"), seconds=(0., 4.), nvml=None):
    clock = iter(seconds)
    s = HardwareSampler(root, clock=lambda: next(clock))
    s.nvml = nvml
    return s


def test_a_sample_has_the_promised_names(use):
    use("pynvml", Nvml(n=2))
    with_cards = HardwareSampler().sample()
    assert set(with_cards) == {*SAMPLED, *(f"gpu{i}_{n}" for i in range(2) for n in SAMPLED_PER_GPU)} and all(type(x) is float and math.isfinite(x) for x in with_cards.values())
    assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", n) for n in with_cards)
    use("pynvml", None)
    without = HardwareSampler().sample()
    assert set(without) == set(SAMPLED) and 0 <= without["cpu_utilization_ratio"] <= 1 and without["process_memory_bytes"] > 1e7 and without["memory_available_bytes"] > 1e7
    assert {k: with_cards[f"gpu1_{k}"] for k in SAMPLED_PER_GPU} == dict(utilization_ratio=.9, memory_used_bytes=11*2**30, power_watts=250.5, temperature_celsius=51, throttled=0)


def test_values_that_a_card_does_not_tell_are_left_out():
    s = sampler(nvml=Nvml(n=1, refuses=["nvmlDeviceGetPowerUsage", "nvmlDeviceGetUtilizationRates"], reasons={0: 1|64}))
    values = s.sample()
    assert {k for k in values if k.startswith("gpu")} == {"gpu0_memory_used_bytes", "gpu0_temperature_celsius", "gpu0_throttled"} and values["gpu0_throttled"] == 1
    s = sampler(nvml=Nvml(n=2, refuses=["nvmlDeviceGetHandleByIndex"]))
    assert set(s.sample()) == set(SAMPLED)


def test_rates_are_what_counters_have_gained(tmp_path, monkeypatch):
    disk = [SimpleNamespace(read_bytes=r, write_bytes=w) for r, w in ((100, 1000), (500, 900))]
    nets = [dict(eth0=SimpleNamespace(bytes_sent=s, bytes_recv=r), eth1=SimpleNamespace(bytes_sent=1, bytes_recv=1), lo=SimpleNamespace(bytes_sent=x, bytes_recv=x)) for s, r, x in ((10, 20, 0), (50, 100, 10**9))]
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: disk.pop(0))
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: nets.pop(0))
    root = eight_a100(tmp_path)
    s = sampler(root, (5., 9.))
    (root/"sys/class/infiniband/mlx5_4/ports/1/counters/port_xmit_data").write_text(str(1004+40))
    (root/"sys/class/infiniband/mlx5_5/ports/1/counters/port_rcv_data").write_text(str(505+20))
    v = s.sample()
    assert {k: x for k, x in v.items() if "per_second" in k} == dict(disk_read_bytes_per_second=100, disk_written_bytes_per_second=0, network_sent_bytes_per_second=10, network_received_bytes_per_second=20,
                                                                      infiniband_sent_bytes_per_second=40, infiniband_received_bytes_per_second=20)


def test_each_sample_begins_where_the_last_one_ended(monkeypatch):
    counted = iter([dict(x=0.), dict(x=10.), dict(x=10.), dict(x=4.), dict(x=5.)])
    monkeypatch.setattr(HardwareSampler, "_counters", lambda self: next(counted))
    s = sampler(seconds=(0., 1., 3., 4., 8.))
    assert [s.sample()["x"] for _ in range(4)] == [10, 0, 0, .25]


def test_the_share_of_the_cores_is_a_share(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 37.)
    assert sampler().sample()["cpu_utilization_ratio"] == .37


def test_two_samples_at_one_moment(monkeypatch):
    counted = iter([dict(x=0.), dict(x=10.)])
    monkeypatch.setattr(HardwareSampler, "_counters", lambda self: next(counted))
    assert sampler(seconds=(3., 3.)).sample()["x"] == 0


def test_no_drive_counters_no_psutil_and_the_end(monkeypatch, use):
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None) # as in some containers
    nvml = use("pynvml", Nvml(n=1))
    s = HardwareSampler()
    assert s.sample()["disk_read_bytes_per_second"] == 0
    s.close(); s.close()
    assert nvml.stops == 1 and set(s.sample()) == set(SAMPLED)
    use("psutil", None)
    with pytest.raises(UserError, match=r"llm_scratch\[monitor\]"): HardwareSampler()


def test_the_time_of_this_process_is_counted():
    s = sampler(seconds=(0., 1.))
    start = time.process_time()
    while time.process_time()-start < .3: pass
    assert .25 < s.sample()["process_cpu_cores"] < 5


# --- preflight: the rule and the text -----------------------------------------------------------------------------------------------

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@settings(deadline=None)
@given(times, st.floats(1.01, 10), st.randoms())
def test_laws_of_the_rule(seconds, threshold, rng):
    slow = slow_ranks(seconds, threshold)
    assert len(slow) <= len(seconds)//2, "at least half of the ranks are ordinary"
    assert [seconds[r] for r in slow] == sorted((seconds[r] for r in slow), reverse=True)
    others = [s for r, s in enumerate(seconds) if r not in slow]
    assert all(seconds[r] > max(others) for r in slow) and min(range(len(seconds)), key=seconds.__getitem__) not in slow
    assert slow_ranks([s*2**-3 for s in seconds], threshold) == slow # another unit
    order = list(range(len(seconds))); rng.shuffle(order)
    assert {order[r] for r in slow_ranks([seconds[i] for i in order], threshold)} == set(slow)


@settings(deadline=None)
@given(st.lists(st.floats(1., 1.45), min_size=3, max_size=40), st.floats(1e-6, 1e3), st.data())
def test_one_rank_among_equals_is_found(factors, second, data):
    seconds = [second*f for f in factors]
    bad = data.draw(st.integers(0, len(seconds)-1))
    assert slow_ranks(seconds) == []
    seconds[bad] = 2.3*max(seconds)
    assert slow_ranks(seconds) == [bad]


def test_two_ranks_and_two_of_four():
    assert slow_ranks([1., 2.5]) == [1] and slow_ranks([1., 1., 3., 2.8]) == [2, 3] and slow_ranks([2., 3., 3.1]) == [] # against the lower median


@pytest.mark.parametrize("threshold", [1, .5, 0, -2])
def test_a_threshold_that_calls_ordinary_ranks_slow(threshold):
    with pytest.raises(UserError, match="give more than 1"): slow_ranks([1., 1.], threshold)


@settings(deadline=None)
@given(st.integers(0, 200))
def test_neighbours_swap_once_and_never_two_at_a_time(n):
    rounds = neighbour_rounds(n)
    assert sorted(tuple(sorted(p)) for pairs in rounds for p in pairs) == sorted({tuple(sorted((i, (i+1) % n))) for i in range(n) if n > 1})
    assert all(pairs and len({r for p in pairs for r in p}) == 2*len(pairs) for pairs in rounds) and len(rounds) <= (3 if n % 2 else 2)


def test_bandwidths():
    t = AllReduceTime(8000, 4, 2.)
    assert (t.algorithm_bandwidth, t.bus_bandwidth) == (4000, 6000) and AllReduceTime(8000, 1, 2.).bus_bandwidth == 0 and AllReduceTime(8000, 2, 2.).bus_bandwidth == 4000


def found(seconds=(1., 1.), hosts=None, links=None, threshold=1.5): return Preflight(hosts or ("a",)*len(seconds), seconds, links or {}, (AllReduceTime(4096, 2, .5),), threshold)


def test_links_are_compared_with_their_own_kind():
    hosts, links = ("a", "a", "b", "b", "c", "c"), {(0, 1): 1., (1, 2): 10., (2, 3): 1.2, (3, 4): 11., (4, 5): 3., (5, 0): 9.}
    p = found((1.,)*6, hosts, links)
    assert p.slow_links == [(4, 5)] and p.kind((1, 2)) == [(1, 2), (3, 4), (5, 0)] and p.times_typical((4, 5)) == 2.5 and p.slow == []
    assert "link of ranks 4 and 5, c to c (2.5 times the median); take it out, or look at cables" in preflight_text(p)
    assert found((1.,)*6, hosts, links | {(5, 0): 90.}).slow_links == [(4, 5), (5, 0)] and found((1., 1.), None, {(0, 1): 5.}).slow_links == []


def test_the_text_names_the_rank_and_its_host():
    text = preflight_text(found((1., 1.2, 9., 1.), ("h0", "h0", "h1", "h1")))
    assert text.splitlines()[-1] == "preflight: slow: rank 2 on h1 (9.0 times the median); take it out, or look at clocks, heat and what else runs there"
    assert [line for line in text.splitlines() if line.endswith("<- slow")] == [line for line in text.splitlines() if "9000.000" in line] and "link" not in text
    assert preflight_text(found()).splitlines()[-1] == "preflight: 2 ranks, none is slow (more than 1.5 times the median)"
    assert preflight_text(found((1.,))).splitlines()[-1].startswith("preflight: 1 rank, none")
    assert re.search(r"4,096 +500\.000 +0\.000 +0\.000", text)


# --- preflight: processes ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def alone():
    "A process group of one."
    with tempfile.TemporaryDirectory() as tmp:
        dist.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=0, world_size=1)
        try: yield
        finally: dist.destroy_process_group()


def test_a_preflight_of_one(alone):
    asked = []
    p = preflight(sizes=[4096, 10], work=lambda device: asked.append(device) or 7., exchange=None)
    assert (p.seconds, p.links, p.slow, asked) == ((7.,), {}, [], ["cpu"]) and [(r.n_bytes, r.n_ranks, r.bus_bandwidth) for r in p.reduces] == [(4096, 1, 0), (8, 1, 0)] and all(r.seconds > 0 for r in p.reduces)
    with pytest.raises(UserError, match="give more than 1"): preflight(threshold=1, work=lambda device: asked.append("late") or 1.)
    assert "late" not in asked


def test_a_wrong_sum_is_told(alone, monkeypatch):
    real = dist.all_reduce
    def wrong(x, **how): real(x, **how); x[-1] += 1
    monkeypatch.setattr(dist, "all_reduce", wrong)
    with pytest.raises(RuntimeError, match="rank 0 a wrong sum: 1 to 2 instead of 1"): time_all_reduce(64)


def test_the_slowest_rank_counts_and_the_median_round(alone, monkeypatch):
    real, seen, barriers = dist.all_reduce, [], []
    monkeypatch.setattr(infra, "_times", lambda work, rounds, device, ready: (work(), barriers.append(ready)) and [1., 9., 2., 8., 3.][:rounds])
    monkeypatch.setattr(dist, "all_reduce", lambda x, op=dist.ReduceOp.SUM: (seen.append((op, x.numel())), real(x, op=op)))
    assert time_all_reduce(64).seconds == 3. and seen == [(dist.ReduceOp.SUM, 16), (dist.ReduceOp.SUM, 16), (dist.ReduceOp.MAX, 5)] and barriers == [dist.barrier]


SCRIPT = """
import os, sys, time, torch
from llm_scratch.infrastructure import exchange_seconds, preflight_rank
rank = int(os.environ["RANK"])
n, slow_rank, slow_link = (eval(a) for a in sys.argv[1:4])
def work(device): # so many products, the median of some goes
    def go():
        start = time.perf_counter()
        for _ in range(400 if rank == slow_rank else 1): a @ a
        return time.perf_counter()-start
    a = torch.ones(128, 128)
    return sorted(go() for _ in range(15))[7]
def exchange(peer, device): # counted, not timed: a swap is a millisecond
    swaps = 30 if {rank, peer} == slow_link else 1
    for _ in range(swaps): assert exchange_seconds(peer, device, n_bytes=4096, rounds=1) > 0
    return (swaps if rank < peer else 1)/1000 # the end that waits longer counts
sys.exit(preflight_rank(sizes=[2**14], threshold=20, work=work, exchange=exchange, wait_seconds=60))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path/"rank.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_a_slow_rank_is_named_under_torchrun(script):
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "2", "1", "None"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stdout.count("preflight:") == 1 and "preflight: slow: rank 1 on " in done.stdout and "link" in done.stdout


def test_none_is_slow_and_then_a_link_is(script):
    status, texts = infra._run_ranks([sys.executable, str(script), "3", "None", "None"], 3, timeout=300)
    assert status == 0 and "preflight: 3 ranks, none is slow (more than 20 times the median)" in texts[0] and texts[1:] == ["", ""], texts
    assert [line.split()[0] for line in texts[0].splitlines() if re.match(r" +\d-\d ", line)] == ["0-1", "1-2", "2-0"]
    status, texts = infra._run_ranks([sys.executable, str(script), "3", "None", "{2, 1}"], 3, timeout=300)
    assert status == 1 and "preflight: slow: link of ranks 1 and 2, " in texts[0] and "(30.0 times the median)" in texts[0] and "rank 1 on" not in texts[0], texts


def test_a_rank_that_dies_or_never_comes_ends_all_with_one_line(tmp_path):
    die = "import os, sys\nfrom llm_scratch.infrastructure import preflight_rank\nrank = os.environ['RANK']\n"
    end = "from llm_scratch.core import UserError\ntry: sys.exit(preflight_rank(sizes=[1024], work=work, wait_seconds=4))\nexcept UserError as e: sys.exit(f'SAID {e}')"
    before, within = die + "if rank == '1': sys.exit(3)\nwork = None\n" + end, die + "def work(device):\n    if rank == '1': os._exit(9)\n    return 1.\n" + end
    start = time.monotonic()
    status, texts = infra._run_ranks([sys.executable, "-c", before], 2, timeout=200)
    assert status in (1, 3) and re.fullmatch(r"SAID rank 0 of 2 waited 4 s at 127\.0\.0\.1:\d+ and did not meet the others: are all started, and is the port open\? \(.*\)", texts[0].strip().splitlines()[-1]), texts
    status, texts = infra._run_ranks([sys.executable, "-c", within], 2, timeout=200)
    assert status in (1, 9) and texts[0].strip().splitlines()[-1].startswith("SAID rank 0 of 2 gave up: "), texts
    assert "Traceback" not in texts[0] and time.monotonic()-start < 300


def test_nothing_is_left_of_ranks_that_hang(tmp_path):
    code = f"import os, time; open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid())); print('here', flush=True); time.sleep(500 if os.environ['RANK'] == '0' else 0)"
    status, texts = infra._run_ranks([sys.executable, "-c", code], 2, timeout=6)
    assert status == 124 and texts[1] == "here\n"
    assert not any(psutil.pid_exists(int((tmp_path/r).read_text())) for r in "01" if (tmp_path/r).exists())


def test_no_rank_and_wrong_numbers(monkeypatch):
    for v in infra.RANK_VARIABLES: monkeypatch.delenv(v, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set.*torchrun"): infra.preflight_rank()
    with pytest.raises(UserError, match="0 ranks"): local_preflight(0)


def test_local_preflight_passes_on_what_a_rank_says():
    with pytest.raises(UserError, match="threshold=1 would call"): local_preflight(1, threshold=1)


# --- one product, two libraries ---------------------------------------------------------------------------------------

SWITCH = torch.backends.mkldnn.matmul


@pytest.fixture
def gain():
    "A function that answers anew, and forgets what it found here."
    infra.products_gain.cache_clear()
    yield infra.products_gain
    infra.products_gain.cache_clear()


def timed(monkeypatch, usual, other):
    "Each way takes as long as we say; the products are done."
    monkeypatch.setattr(infra, "_thread_times", lambda work, rounds: (work(), [5*(t := other if SWITCH.fp32_precision == "bf16" else usual), t])[1])


def test_a_faster_library_is_told_by_how_much(monkeypatch, gain):
    timed(monkeypatch, 3., 2.)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exact = gain(64)
    assert exact in (1.5, 1.)  # 1 on a processor with matrix units, whose products are rounded
    before = SWITCH.fp32_precision
    with infra.quick_products() as quick: assert (quick, SWITCH.fp32_precision) == ((True, "bf16") if gain() > 1.3 else (False, before))
    assert SWITCH.fp32_precision == before


def test_a_library_that_rounds_more_is_not_used(monkeypatch, gain):
    timed(monkeypatch, 3., 1.)

    @infra.contextmanager
    def rounding():
        with torch.autocast("cpu", torch.bfloat16): yield
    monkeypatch.setattr(infra, "_other_library", rounding)
    monkeypatch.setattr(infra, "_thread_times", lambda work, rounds: [1. if torch.is_autocast_enabled("cpu") else 3.])
    assert gain() == 1.


def test_the_choice_is_made_on_one_thread_and_leaves_the_threads_alone(gain):
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    infra._thread_times(lambda: seen.append(torch.get_num_threads()), 3)
    gain(64)
    assert seen == [1]*4 and torch.get_num_threads() == 2
    torch.set_num_threads(n)


@pytest.mark.parametrize("faster, with_gpu, n_positions, expected", [(1.29, False, 64, (False, False)), (1.31, False, 64, (True, True)), (9., False, 512, (True, True)), (9., False, 513, (True, False)), (9., True, 64, (False, False))])
def test_when_products_are_quick(monkeypatch, faster, with_gpu, n_positions, expected):
    monkeypatch.setattr(infra, "products_gain", lambda: faster)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: with_gpu)
    usual, flash = SWITCH.fp32_precision, torch.backends.cuda.flash_sdp_enabled()
    assert usual != "bf16" and flash
    with pytest.raises(KeyError), infra.quick_products(n_positions) as quick:
        assert (quick, not torch.backends.cuda.flash_sdp_enabled()) == expected and (SWITCH.fp32_precision == "bf16") == expected[0]
        raise KeyError
    assert (SWITCH.fp32_precision, torch.backends.cuda.flash_sdp_enabled()) == (usual, flash)


def test_quick_products_train_the_same_model():
    from llm_scratch.pretraining import TrainState, make_optimizers, train
    cfg, ends = ModelConfig(vocab_size=64, context_len=32, n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_ff=128, d_head=16), []
    for context in (infra.nullcontext(), infra.quick_products(32)):
        torch.manual_seed(0)
        model, ids = Decoder(cfg), torch.arange(128).view(4, 32) % 64
        with context: ends.append([s.loss for s in train(TrainState(model, make_optimizers(model)), [(ids, ids.roll(-1, 1))]*5, lambda step: 1., 5)])
    torch.testing.assert_close(*ends, atol=1e-4, rtol=0)
    assert ends[0][-1] < ends[0][0] - .5
