#!/bin/bash
# Measures what network policies cost the traffic of a pod that they isolate, as ratios within one run. Needs root, nft, rustc,
# python3, iperf3 and the program `bench` (`make bench-policy` builds it).
#
#   bench/policy-cost.sh PROGRAM [ROUNDS [TCP_ROUNDS]]
#
# For each variant a node between a pod and another node's pod, with masquerading and connection tracking as --ip-masq has
# them: none and none2 without policies (the second one's ratio is the error of the measurement), ten and thousand with as many
# policies on the pod, of which one allows the traffic. All of them are there at once, and take turns in each round, in another
# order than the round before. From the other pod go 5,000 datagrams of 64 bytes of one connection, then 1,000 of a
# connection each, which is when rules are looked at; the CPU time from there to the receiver counts (see datagrams.rs). Then
# iperf3 sends one TCP stream for a second through each in turn, TCP_ROUNDS times.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bench=$(realpath "${1:?the program bench, such as target/release/bench}")
work=$(mktemp -d)
me=$$
variants="none ten thousand none2"
cleanup() {
    for v in $variants; do for x in n p o; do
        ip netns pids q$me$v$x 2>/dev/null | xargs -r kill 2>/dev/null || true
        ip netns del q$me$v$x 2>/dev/null || true
    done; done
    rm -rf "$work"
}
trap cleanup EXIT
rustc -O --edition 2021 -o "$work/send" "$here/datagrams.rs"
for v in $variants; do
    node=q$me${v}n pod=q$me${v}p other=q$me${v}o
    for ns in $node $pod $other; do ip netns add $ns; ip -n $ns link set lo up; done
    ip netns exec $node sysctl -qw net.ipv4.ip_forward=1
    ip -n $node link add cni0 type veth peer name eth0 netns $pod
    ip -n $node link add flannel.1 type veth peer name eth0 netns $other
    ip -n $node addr add 10.244.1.1/24 dev cni0; ip -n $node link set cni0 up
    ip -n $node addr add 10.244.2.1/24 dev flannel.1; ip -n $node link set flannel.1 up
    for n in 1 2; do
        ns=$([ $n = 1 ] && echo $pod || echo $other)
        ip -n $ns addr add 10.244.$n.2/24 dev eth0; ip -n $ns link set eth0 up
        ip -n $ns route add default via 10.244.$n.1
    done
    ip netns exec $node nft -f - <<NFT
table ip flannel-ipv4 {
    chain postrtg { type nat hook postrouting priority srcnat; meta mark & 0x4000 == 0x4000 return
        ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 return; ip saddr 10.244.0.0/16 masquerade; }
    chain forward { type filter hook forward priority 0; ip saddr 10.244.0.0/16 accept; ip daddr 10.244.0.0/16 accept; }
}
NFT
    case $v in
        ten) ip netns exec $node "$bench" policy --apply 10 ;;
        thousand) ip netns exec $node "$bench" policy --apply 1000 ;;
    esac
    # A socket that nobody reads from: what doesn't fit ends there.
    ip netns exec $pod python3 -c 'import socket,time; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("",9)); time.sleep(3600)' &
    ip netns exec $pod iperf3 -s >/dev/null &
done
sleep 1
python3 - "$work/send" "q$me" ${2:-300} ${3:-20} $variants <<'PY'
import json, statistics, subprocess, sys
send, prefix, rounds, tcp_rounds, *variants = sys.argv[1:]
senders = {v: subprocess.Popen(["ip", "netns", "exec", f"{prefix}{v}o", send, "10.244.1.2:9"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True) for v in variants}
def cost(variant, line, count):
    sender = senders[variant]
    print(line, file=sender.stdin, flush=True)
    return int(sender.stdout.readline()) / count
def in_turns(rounds, measure):
    measured = []
    for turn in range(int(rounds)):
        order = variants[turn % len(variants):] + variants[:turn % len(variants)]
        if turn // len(variants) % 2:
            order.reverse()
        measured.append({v: measure(v) for v in order})
    return measured
def ratios(what, measured):
    for v, to in [(v, "none") for v in variants[1:]] + [("thousand", "ten")]:
        ratios = sorted(c[v] / c[to] for c in measured)
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(f"{what}, {v} / {to}: median {statistics.median(ratios):.4f}, quartiles {low:.4f} and {high:.4f}, "
              f"{len(ratios)} rounds")
for what, line, count in [("a datagram", "5000", 5000), ("a datagram with a connection of its own", "fresh 1000", 1000)]:
    costs = in_turns(rounds, lambda variant: cost(variant, line, count))
    for v in variants:
        print(f"{v}: {statistics.median(c[v] for c in costs):.0f} ns of CPU {what}")
    ratios(f"CPU {what}", costs)
def stream(variant):
    told = subprocess.run(["ip", "netns", "exec", f"{prefix}{variant}o", "iperf3", "-c", "10.244.1.2", "-A", "0,1", "-t", "1", "-J"],
                          stdout=subprocess.PIPE, check=True)
    return json.loads(told.stdout)["end"]["sum_received"]["bits_per_second"]
speeds = in_turns(tcp_rounds, stream)
for v in variants:
    print(f"{v}: {statistics.median(c[v] for c in speeds) / 1e9:.2f} Gbit/s of one TCP stream")
ratios("TCP throughput", speeds)
for sender in senders.values():
    sender.stdin.close(); sender.wait()
PY
