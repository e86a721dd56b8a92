//! A pod gets no address: from the container runtime to the pool.

use ipnet::IpNet;
use subnet::env_file::gateway;

use super::finding::Finding;
use super::seen::{Env, Observation, Pod};
use crate::cni::{Conf, Flannel};
use crate::show::span;

pub(super) fn findings(seen: &Observation) -> Vec<Finding> {
    let mut findings = Vec::new();
    env(seen, &mut findings);
    configuration(seen, &mut findings);
    bridge(seen, &mut findings);
    if findings.is_empty() {
        findings.push(Finding::ok("cni", "the runtime finds flannel, its plugins and this node's subnet"));
    }
    pool(seen, &mut findings);
    findings.extend(seen.pod.iter().flat_map(|asked| pod(seen, asked)));
    findings
}

fn env(seen: &Observation, findings: &mut Vec<Finding>) {
    let path = seen.subnet_file.display().to_string();
    let reason = || {
        let conditions = seen.agent.status().map(|status| &status.conditions);
        let unmet = conditions.and_then(|all| all.iter().find_map(|(name, why)| Some((name, why.as_ref()?))));
        unmet.map(|(name, why)| format!(": {name}: {why}")).unwrap_or_default()
    };
    match &seen.env {
        Env::Written(_) => {}
        Env::Missing => findings.push(Finding::trouble(
            "subnet-file",
            path,
            format!("it does not exist, so the CNI plugin knows no subnet{}", reason()),
            "flanneld writes it once it is ready: look at what it waits for (flanneld status), or give doctor its --subnet-file",
        )),
        Env::Bad(why) => findings.push(Finding::trouble(
            "subnet-file",
            path,
            format!("the CNI plugin can't use it: {why}"),
            "remove it, and flanneld writes it again; find the program that changed it",
        )),
    }
}

fn configuration(seen: &Observation, findings: &mut Vec<Finding>) {
    let directory = seen.cni_conf_dir.display();
    let Some(confs) = &seen.confs else {
        let why =
            format!("{directory} does not exist here: run doctor on the node itself, or give --cni-conf-dir");
        findings.push(Finding::not_run("cni-conf", why));
        return;
    };
    let usable = |file: &&crate::cni::ConfFile| file.conf.is_ok();
    let ours = |file: &&crate::cni::ConfFile| file.conf.as_ref().is_ok_and(|conf| conf.flannel().is_some());
    let first = confs.iter().find(usable);
    let flannel = confs.iter().find(ours);
    for file in confs {
        if let Err(why) = &file.conf {
            findings.push(Finding::trouble(
                "cni-conf",
                file.path.display().to_string(),
                format!("a runtime can't use it: {why}"),
                "correct it or remove it",
            ));
        }
    }
    match (first, flannel) {
        (_, None) => findings.push(Finding::trouble(
            "cni-conf",
            directory.to_string(),
            "no CNI configuration there names flannel, so pods get no network from it",
            "install it: --cni-conf=SOURCE:DESTINATION, or the init container install-cni of kube-flannel.yml",
        )),
        (Some(first), Some(flannel)) if first.path != flannel.path => findings.push(Finding::trouble(
            "cni-conf",
            first.path.display().to_string(),
            format!(
                "the runtime takes the first file by name, which is this one, and not {}",
                flannel.path.display()
            ),
            format!("remove {} if its network is not in use any more, and restart the pods that it gave addresses to", first.path.display()),
        )),
        _ => {}
    }
    if seen.missing_plugins.is_none() {
        let why = "none of the directories of plugins exists here: run doctor on the node itself, or give --cni-bin-dirs";
        findings.push(Finding::not_run("cni-plugin", why));
    }
    for plugin in seen.missing_plugins.iter().flatten() {
        let directories = seen.cni_bin_dirs.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        let remedy = if plugin == "flannel" {
            "install it: the init container install-cni-plugin of kube-flannel.yml copies it"
        } else {
            "install the CNI plugins of your distribution, or of containernetworking/plugins, there"
        };
        findings.push(Finding::trouble(
            "cni-plugin",
            plugin.clone(),
            format!("the CNI configuration names it, and it is not in {}", directories.join(" or ")),
            remedy,
        ));
    }
}

/// Whether the bridge plugin adds no pod of `subnet` to a bridge with this address. Of IPv6 it allows addresses of other networks.
fn refuses(address: IpNet, subnet: IpNet) -> bool {
    if address.addr() == gateway(subnet) {
        return false;
    }
    match (address, subnet) {
        (IpNet::V4(_), IpNet::V4(_)) => true,
        (IpNet::V6(_), IpNet::V6(_)) => {
            subnet.contains(&address.addr()) || address.contains(&gateway(subnet))
        }
        _ => false,
    }
}

/// The bridge has another address than this node's gateway.
fn bridge(seen: &Observation, findings: &mut Vec<Finding>) {
    let (Ok(links), Env::Written(subnets)) = (&seen.links, &seen.env) else { return };
    let conf = seen.confs.iter().flatten().filter_map(|file| file.conf.as_ref().ok()).find_map(Conf::flannel);
    let name = conf.as_ref().map_or("cni0", Flannel::bridge);
    let Some(link) = links.iter().find(|link| link.bridge && link.name == name) else { return };
    let own: Vec<IpNet> = subnets.iter().collect();
    let wrong = |address: &&IpNet| own.iter().any(|subnet| refuses(**address, *subnet));
    for address in link.addresses.iter().filter(wrong) {
        let expected = own.iter().find(|subnet| subnet.addr().is_ipv4() == address.addr().is_ipv4());
        let expected = expected.map(|subnet| gateway(*subnet).to_string()).unwrap_or_default();
        findings.push(Finding::trouble(
            "bridge",
            name.to_owned(),
            format!("it has the address {address}, and this node's gateway is {expected}: the bridge plugin then refuses to add pods"),
            format!("drain this node's pods, then ip address del {address} dev {name}"),
        ));
    }
    if !link.up {
        findings.push(Finding::trouble(
            "bridge",
            name.to_owned(),
            "it is set down",
            format!("ip link set {name} up"),
        ));
    }
}

fn pool(seen: &Observation, findings: &mut Vec<Finding>) {
    let addresses = &seen.addresses;
    if !addresses.exists {
        let directory = addresses.directory.display();
        findings.push(Finding::not_run(
            "addresses",
            format!("{directory} does not exist here: no pod had an address yet, or it is not mounted"),
        ));
        return;
    }
    let leaked = match &addresses.leaked {
        Ok(leaked) => leaked.as_slice(),
        Err(why) => {
            findings.push(Finding::not_run("leaked addresses", why.clone()));
            &[]
        }
    };
    let before = findings.len();
    for (subnet, size, used) in &addresses.pools {
        let of_pool: Vec<_> = leaked.iter().filter(|(address, ..)| subnet.contains(address)).collect();
        let oldest = of_pool.iter().filter_map(|(_, _, age)| *age).max();
        let oldest = oldest.map(|age| format!(" (oldest {})", span(age))).unwrap_or_default();
        let full = *used >= *size && *size > 0;
        let taken = filled(*used, *size);
        if !of_pool.is_empty() {
            let one = if of_pool.len() == 1 {
                format!("{} is reserved for a pod that no longer exists", of_pool[0].0)
            } else {
                format!("{} are reserved for pods that no longer exist", of_pool.len())
            };
            let state = if full { "the pool is full" } else { "the pool leaks" };
            findings.push(Finding::trouble(
                "addresses",
                subnet.to_string(),
                format!("{state}: {taken}, {one}{oldest}, in {}", addresses.directory.display()),
                "flanneld doctor --fix leaked-addresses removes exactly these files (--dry-run lists them)",
            ));
        } else if full {
            findings.push(Finding::trouble(
                "addresses",
                subnet.to_string(),
                format!("the pool is full: {taken}, all of them by living pods"),
                "run fewer pods on this node (kubelet --max-pods), or give nodes larger subnets (SubnetLen, podCIDR)",
            ));
        }
    }
    if findings.len() == before {
        findings.push(Finding::ok("addresses", taken(&addresses.pools)));
    }
}

/// How full a pool is. The addresses of a /64 are too many to be counted.
fn filled(used: u64, size: u64) -> String {
    if size > u64::from(u32::MAX) { format!("{used} taken") } else { format!("{used} of {size} taken") }
}

/// How full pools are in which nothing is wrong.
fn taken(pools: &[(IpNet, u64, u64)]) -> String {
    let all: Vec<String> =
        pools.iter().map(|(subnet, size, used)| format!("{} of {subnet}", filled(*used, *size))).collect();
    if all.is_empty() { "no pool yet".to_owned() } else { all.join(", ") }
}

fn pod(seen: &Observation, pod: &Pod) -> Vec<Finding> {
    let Pod { asked, reserved, living } = pod;
    let living = match living {
        Ok(living) => living,
        Err(why) => return vec![Finding::not_run("pod", why.clone())],
    };
    let directory = seen.addresses.directory.display();
    if let Some(address) = living.first() {
        if reserved.is_empty() {
            return vec![Finding::trouble(
                "pod",
                asked.clone(),
                format!(
                    "it has {address}, which is not reserved in {directory}: another pod may get it as well"
                ),
                "restart the pod; find out who removed its file",
            )];
        }
        return vec![Finding::ok("pod", format!("{asked} has {address} and is attached to this node"))];
    }
    vec![match reserved.first() {
        Some(address) => Finding::trouble(
            "pod",
            asked.clone(),
            format!(
                "{address} is reserved for it, and no namespace on this node has it: it was never attached, or is gone"
            ),
            "look at what the runtime says of its sandbox (crictl pods); flanneld doctor --fix leaked-addresses gives the address back",
        ),
        None => Finding::trouble(
            "pod",
            asked.clone(),
            format!(
                "no address is reserved for it in {directory}: its ADD failed or never came, or it is on another node"
            ),
            "kubectl describe pod shows the error of its ADD; look at the findings about cni above",
        ),
    }]
}
