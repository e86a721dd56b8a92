//! What only files can show: clocks, inotify, locks, and directories that come and go.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use subnet::file::Files;
use subnet::{LeaseStore, StoreError};

use super::bed::{Bed, InFiles};
use super::nodes::{Follower, acquire, hold, key, public, subnets, until, value, within};
use super::sentences::CONFIG;

#[tokio::test]
async fn a_file_is_the_value_of_etcd_with_two_members_more() {
    let bed = InFiles::new(Some(CONFIG)).await;
    let lease = acquire(&bed.node(), CONFIG, 1).await.unwrap();
    let text = fs::read_to_string(bed.file(&key(&lease))).unwrap();
    let start = r#"{"PublicIP":"192.0.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"},"Created":"#;
    assert!(text.starts_with(&format!("{start}{},\"Expires\":", lease.created)), "{text}");
    let names: Vec<_> = fs::read_dir(bed.path.join("subnets")).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[tokio::test]
async fn a_lease_that_expired_long_ago_is_free_and_its_file_goes() {
    let config = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.7.0","SubnetMax":"10.3.7.0"}"#;
    let bed = InFiles::new(Some(config)).await;
    let old = value(7).replace('}', "},").replace("},},", "},\"Expires\":1000}");
    bed.put("10.3.7.0-24", &old, None).await;
    bed.put("10.3.8.0-24", &old, None).await;
    let lease = acquire(&bed.node(), config, 1).await.unwrap();
    assert_eq!(lease.subnets, subnets("10.3.7.0/24"));
    assert_eq!(bed.read("10.3.8.0-24").await, None);
}

#[tokio::test]
async fn an_own_lease_that_expired_is_taken_again_and_one_given_away_is_not() {
    let bed = InFiles::new(Some(CONFIG)).await;
    let expired = |number| value(number).replacen('{', "{\"Expires\":1000,", 1);
    let (waking, late) = (Arc::new(bed.node()), Arc::new(bed.node()));
    let lease = acquire(&*waking, CONFIG, 1).await.unwrap();
    let lost = acquire(&*late, CONFIG, 2).await.unwrap();
    bed.put(&key(&lease), &expired(1), None).await;
    bed.put(&key(&lost), &expired(2), None).await;
    let _holding = hold(&waking);
    let back =
        async || bed.read(&key(&lease)).await.filter(|entry| entry.ttl > Some(Duration::from_secs(80_000)));
    assert_eq!(until(back).await.value, value(1));

    let other = super::nodes::acquire_after(&bed.node(), CONFIG, 3, lost.subnets).await.unwrap();
    assert_eq!(other.subnets, lost.subnets);
    let loss = hold(&late).end().await;
    assert_eq!(loss, subnet::Loss::Taken { subnets: lost.subnets, holder: public(3) });
}

#[tokio::test]
async fn leases_expire_one_after_another_on_time() {
    let bed = InFiles::new(Some(CONFIG)).await;
    for (i, seconds) in [2, 3, 3600].into_iter().enumerate() {
        let ttl = Some(Duration::from_secs(seconds));
        bed.put(&format!("10.3.{i}.0-24"), &value(i as u16), ttl).await;
    }
    let mut follower = Follower::of(Arc::new(bed.node()));
    for left in [3, 2, 1] {
        let leases = follower.leases(|leases| leases.leases.len() <= left).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        // None of those that are still there is past its time by more than the way to us.
        assert!(leases.leases.contains_key(&subnets("10.3.2.0/24")), "{now}: {leases:?}");
    }
}

#[tokio::test]
async fn every_way_of_writing_a_file_is_noticed() {
    let bed = InFiles::new(Some(CONFIG)).await;
    let mut follower = Follower::of(Arc::new(bed.node()));
    follower.until(|known| known.leases.is_some()).await;
    let at = subnets("10.3.1.0/24");
    let path = bed.file("10.3.1.0-24");
    fs::write(&path, value(1)).unwrap();
    follower.leases(|leases| leases.leases.get(&at).is_some_and(|lease| lease.public == public(1))).await;
    let mut open = fs::OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
    open.write_all(value(2).as_bytes()).unwrap();
    drop(open);
    follower.leases(|leases| leases.leases.get(&at).is_some_and(|lease| lease.public == public(2))).await;
    fs::remove_file(&path).unwrap();
    follower.leases(|leases| leases.leases.is_empty()).await;
    fs::write(bed.path.join("elsewhere"), value(3)).unwrap();
    fs::hard_link(bed.path.join("elsewhere"), &path).unwrap();
    follower.leases(|leases| leases.leases.get(&at).is_some_and(|lease| lease.public == public(3))).await;
    fs::rename(&path, bed.path.join("away")).unwrap();
    follower.leases(|leases| leases.leases.is_empty()).await;
}

#[tokio::test]
async fn strange_files_are_reported_or_ignored() {
    let bed = InFiles::new(Some(CONFIG)).await;
    fs::write(bed.file(".hidden"), "x").unwrap();
    fs::write(bed.file(".10.3.9.0-24.4711"), "an interrupted writing").unwrap();
    fs::create_dir(bed.file("10.3.1.0-24")).unwrap();
    fs::write(bed.file("10.3.2.0-24"), vec![b' '; 100_000]).unwrap();
    fs::write(bed.file("10.3.3.0-24"), b"\xff").unwrap();
    bed.put("10.3.4.0-24", &value(4).replacen('{', "{\"Expires\":\"soon\",", 1), None).await;
    assert!(Command::new("mkfifo").arg(bed.file("10.3.5.0-24")).status().unwrap().success());
    let node = Arc::new(bed.node());
    let mut follower = Follower::of(node.clone());
    let found = follower.until(|known| known.leases.is_some()).await.leases.unwrap();
    let why = |key: &str| found.malformed[key].why.as_str();
    for (key, part) in [
        ("10.3.1.0-24", "not a file"),
        ("10.3.2.0-24", "too long"),
        ("10.3.3.0-24", "UTF-8"),
        ("10.3.4.0-24", "Expires: \"soon\""),
        ("10.3.5.0-24", "not a file"),
    ] {
        assert!(why(key).contains(part), "{key}: {}", why(key));
    }
    assert_eq!(found.malformed.len(), 5);
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    assert!(!found.taken().any(|taken| taken.overlaps(&lease.subnets)));
    assert!(bed.file(".hidden").exists() && !bed.file(".10.3.9.0-24.4711").exists());
}

#[test]
fn nodes_in_many_threads_never_share() {
    let run =
        |future| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("config.json"), CONFIG).unwrap();
    let nodes: Vec<_> = (0..6)
        .map(|thread| {
            let path = place.path().to_owned();
            std::thread::spawn(move || {
                run(Box::pin(async move {
                    let mut mine = Vec::new();
                    for number in 0..10 {
                        let node = Files::new(path.clone(), Duration::from_secs(3600));
                        mine.push(acquire(&node, CONFIG, thread * 10 + number).await.unwrap());
                    }
                    mine
                }))
            })
        })
        .collect();
    let leases: Vec<_> = nodes.into_iter().flat_map(|node| node.join().unwrap()).collect();
    let distinct: std::collections::BTreeSet<_> = leases.iter().map(|lease| lease.subnets).collect();
    let ages: std::collections::BTreeSet<_> = leases.iter().map(|lease| lease.created).collect();
    assert_eq!((distinct.len(), ages.len()), (60, 60));
}

#[tokio::test]
async fn a_claim_waits_for_another_process_that_has_the_lock() {
    let bed = InFiles::new(Some(CONFIG)).await;
    let mut other = Command::new("flock")
        .arg(bed.path.join(".lock"))
        .args(["sh", "-c", "echo locked; read -r go; cp \"$1\" \"$2\"", "sh"])
        .args([bed.path.join("other"), bed.file("10.3.1.0-24")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("flock is missing: install the package util-linux");
    fs::write(bed.path.join("other"), value(9)).unwrap();
    let mut locked = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(other.stdout.take().unwrap()), &mut locked)
        .unwrap();
    assert_eq!(locked, "locked\n");

    let config = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.2.0"}"#;
    let node = bed.node();
    let mut claim = Box::pin(acquire(&node, config, 1));
    let early = tokio::time::timeout(Duration::from_millis(100), &mut claim).await;
    assert!(early.is_err(), "{early:?}");
    // What the other one writes before it unlocks is respected.
    drop(other.stdin.take());
    assert_eq!(claim.await.unwrap().subnets, subnets("10.3.2.0/24"));
    assert!(other.wait().unwrap().success());
}

#[tokio::test]
async fn a_directory_that_is_deleted_and_made_again_is_watched_again() {
    let bed = InFiles::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let mut follower = Follower::of(node.clone());
    follower.leases(|leases| leases.leases.len() == 1).await;
    for round in 2..5 {
        // The directory of leases: the own one is put back.
        fs::remove_dir_all(bed.path.join("subnets")).unwrap();
        until(async || bed.read(&key(&lease)).await).await;
        // Everything: nothing is known any more, so what was known stays.
        fs::remove_dir_all(&bed.path).unwrap();
        follower.until(|known| known.trouble.is_some()).await;
        assert!(matches!(within(node.network()).await, Err(StoreError::Unreachable { .. })));
        fs::create_dir_all(bed.path.join("subnets")).unwrap();
        fs::write(bed.path.join("config.json"), CONFIG).unwrap();
        until(async || bed.read(&key(&lease)).await).await;
        bed.put("10.3.255.0-24", &value(round), None).await;
        follower.leases(|leases| leases.leases.values().any(|lease| lease.public == public(round))).await;
    }
    assert!(!holding.ended());
}

#[tokio::test]
async fn an_empty_directory_is_taken_for_a_missing_mount() {
    let place = tempfile::tempdir().unwrap();
    let node = Arc::new(Files::new(place.path().to_owned(), Duration::from_secs(3600)));
    let error = acquire(&*node, CONFIG, 1).await.unwrap_err();
    assert!(error.to_string().contains("neither config.json nor subnets"), "{error}");
    let error = within(node.network()).await.unwrap_err();
    assert!(matches!(error, StoreError::NoConfig { .. }), "{error}");
    let mut follower = Follower::of(node.clone());
    follower.until(|known| known.trouble.is_some() && known.leases.is_none()).await;
    fs::write(place.path().join("config.json"), CONFIG).unwrap();
    follower.leases(|leases| leases.leases.is_empty()).await;
    acquire(&*node, CONFIG, 1).await.unwrap();
    follower.leases(|leases| leases.leases.len() == 1).await;
}

#[tokio::test]
async fn a_move_that_was_interrupted_between_its_two_files_is_finished() {
    let bed = InFiles::new(Some(CONFIG)).await;
    let (old, new) = ("10.3.7.0-24", "10.3.7.0-24&fd00:3:0:7::-64");
    let both = r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48"}"#;
    bed.put(old, &value(1), Some(Duration::from_secs(3600))).await;
    bed.put(new, &value(1), Some(Duration::from_secs(3600))).await;
    bed.put("10.3.8.0-24", &value(2), None).await;
    assert_eq!(key(&acquire(&bed.node(), both, 1).await.unwrap()), new);
    assert_eq!(bed.read(old).await, None);
    assert!(bed.read("10.3.8.0-24").await.is_some());
}
