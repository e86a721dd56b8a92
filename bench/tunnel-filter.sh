#!/bin/bash
# Measures what the filter of the tunnel's port (docs/configuration.md, "Who may send to a tunnel") costs, and what
# exempting that port from connection tracking would bring, as ratios within one run. Needs root, nft, rustc, python3,
# iperf3.
#
#   bench/tunnel-filter.sh [ROUNDS [TCP_ROUNDS]]
#
# For each variant two nodes with a pod on each, kernel VXLAN in between, and masquerading with connection tracking as
# --ip-masq has it; the filter has 5,000 peers. All of them are there at once, and take turns: each round sends 5,000
# datagrams of 64 bytes from pod to pod through each, in another order than the round before, and takes the CPU time from there to
# the receiver (see datagrams.rs). So what else the machine does, hits all of them alike. Then iperf3 sends one TCP stream
# for a second through each in turn, TCP_ROUNDS times.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
me=$$
variants="none filter notrack none2"
cleanup() {
    for v in $variants; do for x in a b pa pb; do
        ip netns pids f$me$v$x 2>/dev/null | xargs -r kill 2>/dev/null || true
        ip netns del f$me$v$x 2>/dev/null || true
    done; done
    rm -rf "$work"
}
trap cleanup EXIT
rustc -O --edition 2021 -o "$work/send" "$here/datagrams.rs"
peers=$(for i in $(seq 1 20); do for j in $(seq 1 250); do echo -n "10.99.$i.$j, "; done; done)
filter() {
    ip netns exec $1 nft -f - <<NFT
table ip flannel-tunnel {
    set peers { type ipv4_addr; elements = { $peers 192.0.2.1, 192.0.2.2 } }
    set active { type inet_service; flags timeout; timeout 1h; elements = { 8472 } }
    chain forward-8472 {
        ip daddr 10.244.0.0/16 accept
        @th,96,24 != 1 accept
        ip saddr 10.244.0.0/16 counter drop
        iifname != "eth0" fib saddr . iif oif missing counter drop
    }
    chain input-8472 {
        iifname != "eth0" fib saddr . iif oif missing counter drop
        ip saddr @peers accept
        @th,96,24 != 1 accept
        counter drop
    }
    chain input {
        type filter hook input priority 0
        udp dport 8472 iifname "eth0" ip saddr @peers accept
        udp dport 8472 udp dport @active jump input-8472
    }
    chain forward { type filter hook forward priority 0; udp dport 8472 udp dport @active jump forward-8472; }
}
NFT
}
notrack() {
    ip netns exec $1 nft -f - <<NFT
table ip raw-tunnel {
    chain prerouting { type filter hook prerouting priority raw; udp dport 8472 notrack; }
    chain output { type filter hook output priority raw; udp dport 8472 notrack; }
}
NFT
}
for v in $variants; do
    a=f$me${v}a b=f$me${v}b
    for x in a b pa pb; do ip netns add f$me$v$x; ip -n f$me$v$x link set lo up; done
    ip -n $a link add eth0 type veth peer name eth0 netns $b
    for n in 1 2; do
        ns=$([ $n = 1 ] && echo $a || echo $b) pod=$([ $n = 1 ] && echo f$me${v}pa || echo f$me${v}pb) o=$((3 - n))
        ip netns exec $ns sysctl -qw net.ipv4.ip_forward=1
        ip -n $ns addr add 192.0.2.$n/24 dev eth0; ip -n $ns link set eth0 up
        ip -n $ns link add flannel.1 address 02:00:00:00:00:0$n mtu 1450 type vxlan id 1 dstport 8472 local 192.0.2.$n dev eth0 nolearning
        ip -n $ns addr add 10.244.$n.0/32 dev flannel.1; ip -n $ns link set flannel.1 up
        bridge -n $ns fdb append 02:00:00:00:00:0$o dev flannel.1 dst 192.0.2.$o
        ip -n $ns neigh add 10.244.$o.0 lladdr 02:00:00:00:00:0$o dev flannel.1
        ip -n $ns route add 10.244.$o.0/24 via 10.244.$o.0 dev flannel.1 onlink
        ip -n $ns link add cni0 mtu 1450 type veth peer name eth0 netns $pod
        ip -n $ns addr add 10.244.$n.1/24 dev cni0; ip -n $ns link set cni0 up
        ip -n $pod link set eth0 mtu 1450 up; ip -n $pod addr add 10.244.$n.2/24 dev eth0
        ip -n $pod route add default via 10.244.$n.1
        ip netns exec $ns nft -f - <<NFT
table ip flannel-ipv4 {
    chain postrtg { type nat hook postrouting priority srcnat; meta mark & 0x4000 == 0x4000 return
        ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 return; ip saddr 10.244.0.0/16 masquerade; }
    chain forward { type filter hook forward priority 0; ip saddr 10.244.0.0/16 accept; ip daddr 10.244.0.0/16 accept; }
}
NFT
        case $v in filter) filter $ns ;; notrack) notrack $ns ;; esac
    done
    for i in $(seq 50); do ip netns exec f$me${v}pa ping -c1 -W1 10.244.2.2 >/dev/null 2>&1 && break; done
    before=$(ip netns exec $a cat /proc/sys/net/netfilter/nf_conntrack_count)
    ip netns exec f$me${v}pa bash -c 'for i in $(seq 200); do echo x > /dev/udp/10.244.2.2/$((20000 + i)); done' || true
    after=$(ip netns exec $a cat /proc/sys/net/netfilter/nf_conntrack_count)
    echo "conntrack entries on the sending node for 200 flows, $v: $((after - before))"
    # A socket that nobody reads from: what doesn't fit ends there.
    ip netns exec f$me${v}pb python3 -c 'import socket,time; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(("",9)); time.sleep(3600)' &
    ip netns exec f$me${v}pb iperf3 -s >/dev/null &
done
sleep 1
python3 - "$work/send" "f$me" ${1:-400} ${2:-30} $variants <<'PY'
import json, statistics, subprocess, sys
send, prefix, rounds, tcp_rounds, *variants = sys.argv[1:]
senders = {v: subprocess.Popen(["ip", "netns", "exec", f"{prefix}{v}pa", send, "10.244.2.2:9"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True) for v in variants}
def cost(variant, count):
    sender = senders[variant]
    print(count, file=sender.stdin, flush=True)
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
    for v in variants[1:]:
        ratios = sorted(c[v] / c["none"] for c in measured)
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(f"{what}, {v} / none: median {statistics.median(ratios):.4f}, quartiles {low:.4f} and {high:.4f}, "
              f"{len(ratios)} rounds")
costs = in_turns(rounds, lambda variant: cost(variant, 5000))
for v in variants:
    print(f"{v}: {statistics.median(c[v] for c in costs):.0f} ns of CPU a datagram")
ratios("CPU a datagram", costs)
def stream(variant):
    told = subprocess.run(["ip", "netns", "exec", f"{prefix}{variant}pa", "iperf3", "-c", "10.244.2.2", "-t", "1", "-J"],
                          stdout=subprocess.PIPE, check=True)
    return json.loads(told.stdout)["end"]["sum_received"]["bits_per_second"]
speeds = in_turns(tcp_rounds, stream)
for v in variants:
    print(f"{v}: {statistics.median(c[v] for c in speeds) / 1e9:.2f} Gbit/s of one TCP stream")
ratios("TCP throughput", speeds)
for sender in senders.values():
    sender.stdin.close(); sender.wait()
PY
