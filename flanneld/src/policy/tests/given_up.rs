//! Announcements that wait for the API server when it turns out that there is nothing more to wait for.

use super::*;

/// A node whose API server does not answer any more, and announcements of which the first one waits for it.
async fn waiting(bed: &mut Bed) -> JoinHandle<Result<OldConnections, Retry>> {
    bed.server.put_policy("shop", "deny", deny());
    bed.server.put_pod_object(pod("web", None));
    bed.server.put_pod_object(pod("db", None));
    bed.start_ready(PolicyMode::On).await;
    bed.server.behave(|behaviour| behaviour.silent = true);
    let announcer = bed.running().announcer.clone();
    let adding = tokio::spawn(async move { announcer.announce(announced("web", "c1", "10.244.1.2")).await });
    let asks = |bed: &Bed| {
        bed.server.requests().iter().any(|request| request.path.contains("/namespaces/shop/networkpolicies"))
    };
    bed.wait("the question to the API server", asks).await;
    adding
}

fn kept(bed: &Bed) -> Vec<String> {
    let entries = std::fs::read_dir(kept::directory(&bed.subnet_file())).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_end_of_a_sandbox_ends_its_announcement_that_still_waits() {
    within(async |mut bed| {
        let adding = waiting(&mut bed).await;
        bed.running().announcer.release(ended("web", "c1")).await.unwrap();
        let why = adding.await.unwrap().unwrap_err().why;
        assert!(why.contains("its sandbox has ended"), "{why}");
        bed.server.behave(|behaviour| behaviour.silent = false);
        // One that comes later has what the first one asked for behind it.
        bed.announce(announced("db", "c2", "10.244.1.3")).await.unwrap();
        assert!(isolated("10.244.1.3") && !isolated("10.244.1.2"), "{}", table());
        assert_eq!(kept(&bed), ["pod-c2"]);
    });
}

#[test]
fn a_late_announcement_takes_no_address_from_the_pod_that_was_given_it_since() {
    within(async |mut bed| {
        let adding = waiting(&mut bed).await;
        let next = bed.announce(announced("db", "c2", "10.244.1.2"));
        let (next, first) = tokio::join!(next, adding);
        let why = first.unwrap().unwrap_err().why;
        assert!(why.contains("its addresses were given to another pod"), "{why}");
        assert_eq!(next, Ok(OldConnections::Forgotten));
        assert!(isolated("10.244.1.2"), "{}", table());
        assert_eq!(kept(&bed), ["pod-c2"]);
        assert_eq!(bed.figure("flannel_policy_add_failures_total"), 1);
    });
}
