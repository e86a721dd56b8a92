//! Packets as somebody makes them who may send what they like.

use std::net::IpAddr;

/// An IP packet with a UDP datagram for the port of a pod.
pub(super) fn packet(source: IpAddr, target: IpAddr, payload: &[u8]) -> Vec<u8> {
    let len = (8 + payload.len()) as u16;
    let ports: [u8; 4] = (u32::from(super::POD_PORT) << 16 | u32::from(super::POD_PORT)).to_be_bytes();
    let (mut header, addresses) = match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + len).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
            (header, [source.octets().to_vec(), target.octets().to_vec()].concat())
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(len.to_be_bytes());
            header.extend([17, 64]);
            (header, [source.octets().to_vec(), target.octets().to_vec()].concat())
        }
        _ => panic!("{source} and {target} are not of one family"),
    };
    header.extend(&addresses);
    if source.is_ipv4() {
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum);
    }
    let pseudo = [addresses, [0, 17].into(), len.to_be_bytes().into()].concat();
    let sum = checksum(&[&pseudo, &ports, &len.to_be_bytes(), &[0, 0], payload]);
    [header, ports.into(), len.to_be_bytes().into(), sum.into(), payload.into()].concat()
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = |part: &&[u8]| {
        part.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0))).sum::<u32>()
    };
    let mut sum: u32 = parts.iter().map(words).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
