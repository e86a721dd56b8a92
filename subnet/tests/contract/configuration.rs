//! The configuration while it changes, for every kind of store.

use std::sync::Arc;
use std::time::Duration;

use subnet::{LeaseStore, NetworkConfig, StoreError};

use super::bed::{Bed, InEtcd};
use super::etcd_server::Server;
use super::nodes::{network, value, within};
use super::sentences::CONFIG;

/// A configuration of its own for each number.
fn config(number: u8) -> String {
    CONFIG.replace("10.3.", &format!("10.{number}."))
}

/// Waits for word of a change, and reads.
async fn next(node: &impl LeaseStore) -> Result<NetworkConfig, StoreError> {
    within(node.network_changed()).await;
    within(node.network()).await
}

/// Does as an agent does until this is read: it may be woken for nothing.
async fn until(node: &impl LeaseStore, number: u8) {
    while next(node).await.ok() != Some(network(&config(number))) {}
}

pub(crate) async fn a_configuration_that_changes_is_noticed<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = bed.node();
    node.network().await.unwrap();
    for number in [10, 20, 30] {
        // Before the call.
        bed.configure(Some(&config(number))).await;
        until(&node, number).await;
        // And while it waits.
        tokio::join!(until(&node, number + 1), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            bed.configure(Some(&config(number + 1))).await;
        });
    }
    // What can't be used is a change like any other.
    bed.configure(Some("nonsense")).await;
    while !matches!(next(&node).await, Err(StoreError::BadConfig { .. })) {}
    bed.configure(Some(CONFIG)).await;
    until(&node, 3).await;
}

pub(crate) async fn a_configuration_that_goes_and_comes_is_noticed<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = bed.node();
    node.network().await.unwrap();
    for _ in 0..2 {
        bed.configure(None).await;
        while next(&node).await.is_ok() {}
        bed.configure(Some(CONFIG)).await;
        until(&node, 3).await;
    }
}

pub(crate) async fn leases_that_change_are_no_configuration<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = bed.node();
    node.network().await.unwrap();
    let changed = node.network_changed();
    tokio::pin!(changed);
    for number in 1..5 {
        bed.put("10.3.7.0-24", &value(number), None).await;
        let early = tokio::time::timeout(Duration::from_millis(50), &mut changed).await;
        assert!(early.is_err(), "{number}");
    }
    bed.configure(Some(&config(9))).await;
    within(changed).await;
}

#[tokio::test]
async fn files_are_noticed_when_they_are_renamed_into_place() {
    let bed = super::bed::InFiles::new(Some(CONFIG)).await;
    let node = bed.node();
    node.network().await.unwrap();
    for number in 10..14 {
        std::fs::write(bed.path.join("new"), config(number)).unwrap();
        std::fs::rename(bed.path.join("new"), bed.path.join("config.json")).unwrap();
        until(&node, number).await;
    }
    // The whole store, as by an unmounted file system.
    bed.cut().await;
    assert!(matches!(next(&node).await, Err(StoreError::Unreachable { .. })));
    bed.mend().await;
    until(&node, 13).await;
}

async fn compact(bed: &InEtcd) {
    let mut client = bed.client.clone();
    let now = client.get("any", None).await.unwrap().header().unwrap().revision();
    client.compact(now, None).await.unwrap();
}

#[tokio::test]
async fn a_configuration_in_etcd_is_noticed_after_compactions_cuts_and_restarts() {
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server.clone(), Some(CONFIG)).await;
    let node = bed.node();
    node.network().await.unwrap();
    // History is removed while it is watched.
    tokio::join!(until(&node, 10), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        bed.put("10.3.7.0-24", &value(7), None).await;
        compact(&bed).await;
        bed.configure(Some(&config(10))).await;
    });
    // And before, with the change in it.
    bed.configure(Some(&config(20))).await;
    bed.put("10.3.7.0-24", &value(8), None).await;
    compact(&bed).await;
    until(&node, 20).await;
    // Where nothing was read yet there is nothing to wait for.
    within(bed.node().network_changed()).await;
    tokio::join!(until(&node, 30), async {
        bed.cut().await;
        bed.configure(Some(&config(30))).await;
        bed.mend().await;
    });
    tokio::join!(until(&node, 40), async {
        server.kill();
        server.start();
        server.answering(None).await;
        bed.configure(Some(&config(40))).await;
    });
    // The same text again is a change too: what was between is unknown.
    bed.configure(Some(&config(40))).await;
    within(node.network_changed()).await;
}
