//! Who computes the checksums of packets that leave by the tunnel.

use subnet::Family;

use crate::bed::Member;
use crate::site::{Kind, Site, config, logs, lost, pings};

const DEVICES: [&str; 2] = ["flannel.1", "flannel-v6.1"];

/// Whether `ethtool` says that it is on; `None` without the device.
fn is_on(member: &Member, device: &str) -> Option<bool> {
    let told = member.try_show(&format!("ethtool -k {device}"));
    let line = told.lines().find_map(|line| line.trim().strip_prefix("tx-checksum-ip-generic: "))?;
    Some(line.starts_with("on"))
}

fn backend(offload: &str) -> String {
    config(&Family::BOTH, &format!(r#"{{"Type":"vxlan","ChecksumOffload":"{offload}"}}"#))
}

#[test]
fn checksum_offload_that_is_off_stays_off_and_the_key_is_followed_live() {
    for kind in Kind::ALL {
        let site = Site::new(kind, &backend("off"));
        let (a, b) = (site.join(), site.join());
        let wait = |device: &str, wanted: bool| {
            a.wait(&format!("{device} with offload {wanted}"), || is_on(&a, device) == Some(wanted));
        };
        for device in DEVICES {
            assert_eq!(is_on(&a, device), Some(false), "{device} at the start");
            for damage in
                [format!("ethtool -K {device} tx-checksum-ip-generic on"), format!("ip link del {device}")]
            {
                a.show(&damage);
                wait(device, false);
            }
        }
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        b.wait("echoes in both families", || {
            pod_a.addresses().iter().all(|to| pod_b.namespace().reaches(to.addr()).unwrap())
        });
        let pings = pings(&[&pod_a, &pod_b]);
        site.configure(&backend("on"));
        DEVICES.iter().for_each(|device| wait(device, true));
        for device in DEVICES {
            a.show(&format!("ethtool -K {device} tx-checksum-ip-generic off"));
            wait(device, true);
        }
        site.configure(&backend("off"));
        DEVICES.iter().for_each(|device| wait(device, false));
        // Not managed any more: it stays as it is.
        site.configure(&backend("auto"));
        for on in [true, false] {
            for device in DEVICES {
                let word = if on { "on" } else { "off" };
                a.wait("a setting of somebody else", || {
                    a.show(&format!("ethtool -K {device} tx-checksum-ip-generic {word}"));
                    std::thread::sleep(std::time::Duration::from_millis(500));
                    is_on(&a, device) == Some(on)
                });
            }
        }
        assert_eq!(lost(pings), [0; 4], "{kind:?}\n{}", logs(&[&a, &b]));
    }
}
