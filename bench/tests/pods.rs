//! Pods of the test bed, attached as a container runtime attaches them.

use std::fs;

use backends::testing::{Fabric, Pod, program};

#[test]
fn pods_attached_by_the_plugin_get_addresses_of_the_nodes_subnet_and_reach_each_other() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    fs::write(node.subnet_file(), env).unwrap();
    let plugin = program("flannel").unwrap();
    let (mut one, two) = (Pod::cni(&node, &plugin).unwrap(), Pod::cni(&node, &plugin).unwrap());
    assert_eq!(one.addresses(), ["10.244.7.2/24".parse().unwrap()]);
    assert!(one.namespace().reaches(two.address()).unwrap());

    let leases = || fs::read_dir(node.dir().join("ipam/cbr0")).unwrap().count();
    let before = leases();
    one.detach().unwrap();
    assert_eq!(leases(), before - 1, "DEL gives the address back");
    assert!(!two.namespace().reaches(one.address()).unwrap());
}

#[test]
fn a_failed_add_tells_what_the_plugin_said() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let error = Pod::cni(&node, &program("flannel").unwrap()).unwrap_err().to_string();
    assert!(error.contains("subnet.env"), "{error}");
}
