#!/bin/bash
# Measures whether two processors that forward packets at once hinder each other at the counter of `numgen inc`, which a node with the fast
# path has for all packets that it forwards. Needs root, nft, rustc, python3, util-linux, two processors and a kernel with nft_numgen.
#
#   bench/shared-counter.sh [ROUNDS]
#
# A node forwards between two pairs of namespaces, by a chain without rules (twice: that is the error), with `inc`, with a random number,
# and with `inc` for one random packet in eight. Each round sends 20,000 datagrams of 64 bytes through each variant, first from one
# processor alone, then from both at once, in another order than the round before, and takes the CPU time from there to the receiver
# (datagrams.rs). The senders have real-time priority for those 50 ms, so that both run at the same time whatever else the machine does; the
# last line says how long both took beside one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
me=$$
cleanup() {
    for x in n s1 s2 r1 r2; do
        ip netns pids c$me$x 2>/dev/null | xargs -r kill 2>/dev/null || true
        ip netns del c$me$x 2>/dev/null || true
    done
    rm -rf "$work"
}
trap cleanup EXIT
rustc -O --edition 2021 -o "$work/send" "$here/datagrams.rs"
for x in n s1 s2 r1 r2; do ip netns add c$me$x; ip -n c$me$x link set lo up; done
ip netns exec c${me}n sysctl -qw net.ipv4.ip_forward=1
for x in s1 s2 r1 r2; do
    net=10.9${x#?}.$([ ${x%?} = s ] && echo 1 || echo 2)
    ip -n c${me}n link add $x type veth peer name eth0 netns c$me$x
    ip -n c${me}n addr add $net.1/24 dev $x; ip -n c${me}n link set $x up
    ip -n c$me$x addr add $net.2/24 dev eth0; ip -n c$me$x link set eth0 up
    ip -n c$me$x route add default via $net.1
done
for n in 1 2; do
    ip netns exec c${me}s$n ping -c1 -W1 10.9$n.2.2 >/dev/null
    # A socket that nobody reads from: what doesn't fit ends there.
    ip netns exec c${me}r$n python3 -c 'import socket,time; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("",9)); time.sleep(3600)' &
done
# Connection tracking, as on each node.
ip netns exec c${me}n nft 'table ip nat { chain p { type nat hook postrouting priority srcnat; }; }'
sleep 1
chrt -f 2 python3 - "$work/send" "c$me" "${1:-60}" <<'PY'
import statistics, subprocess, sys, time
send, prefix, rounds = sys.argv[1:]
RULES = {"chain": "", "chain2": "", "inc": "numgen inc mod 251 == 0 counter", "random": "numgen random mod 251 == 0 counter", "gated": "numgen random mod 8 == 0 numgen inc mod 31 == 0 counter"}
COUNT = 20000
senders = [subprocess.Popen(["taskset", "-c", str(n - 1), "chrt", "-f", "1", "ip", "netns", "exec", f"{prefix}s{n}", send, f"10.9{n}.2.2:9"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in (1, 2)]
def rules(rule):
    table = "table ip t\ndelete table ip t\n"
    table += f"table ip t {{ chain f {{ type filter hook forward priority 10; {rule}\n}}\n}}\n"
    subprocess.run(["ip", "netns", "exec", f"{prefix}n", "nft", "-f", "-"], input=table, text=True, check=True)
times = {1: [], 2: []}
def cost(who):
    start = time.monotonic()
    for sender in who:
        print(COUNT, file=sender.stdin, flush=True)
    took = sum(int(sender.stdout.readline()) for sender in who)
    times[len(who)].append(time.monotonic() - start)
    return took / COUNT / len(who)
costs = {(rule, how): [] for rule in RULES for how in ("alone", "both")}
names = list(RULES)
for turn in range(int(rounds)):
    order = names[turn % len(names):] + names[:turn % len(names)]
    for rule in order if turn // len(names) % 2 else reversed(order):
        rules(RULES[rule])
        costs[rule, "alone"].append(cost(senders[turn % 2:][:1]))
        costs[rule, "both"].append(cost(senders))
for how in ("alone", "both"):
    for rule in RULES:
        ratios = sorted(a / b for a, b in zip(costs[rule, how], costs["chain", how]))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(f"{how}, {rule}: {statistics.median(costs[rule, how]):.0f} ns of CPU a datagram, {statistics.median(ratios):.4f} of an empty chain "
              f"(quartiles {low:.4f} and {high:.4f})")
print(f"time of both at once beside one alone: {statistics.median(times[2]) / statistics.median(times[1]):.2f}")
for sender in senders:
    sender.stdin.close(); sender.wait()
PY
