use std::os::unix::fs::symlink;

use super::*;

/// No change takes longer, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(60);

struct Bed {
    place: tempfile::TempDir,
    watched: Watched,
}

impl Bed {
    /// A file that is not there yet, two directories down.
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let watched = Watched::new(place.path().join("etc/net/net-conf.json"));
        Self { place, watched }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join("etc/net").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    /// As kubelet does it: everything into a new directory, then one link is replaced.
    fn publish(&self, version: &str, text: &str) {
        self.write(&format!("..{version}/net-conf.json"), text);
        symlink(format!("..{version}"), self.path("..data_tmp")).unwrap();
        fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
        if !self.path("net-conf.json").is_symlink() {
            symlink("..data/net-conf.json", self.path("net-conf.json")).unwrap();
        }
    }

    async fn soon(&self) {
        tokio::time::timeout(LIMIT, self.watched.changed()).await.expect("the change is noticed");
    }

    /// Whether the change is noticed before the call, and by a call that has been waiting.
    async fn both_ways(&self, mut change: impl FnMut(u32)) {
        for round in [0, 2] {
            let _ = self.watched.read();
            change(round);
            self.soon().await;
            let _ = self.watched.read();
            tokio::join!(self.soon(), async {
                // The other branch is polled first, and so waits by now.
                tokio::task::yield_now().await;
                change(round + 1);
            });
        }
    }
}

#[tokio::test]
async fn what_was_never_read_has_changed() {
    Bed::new().soon().await;
}

#[tokio::test]
async fn a_file_is_noticed_however_it_is_written() {
    let bed = Bed::new();
    bed.write("net-conf.json", "first");
    bed.both_ways(|round| bed.write("net-conf.json", &format!("in place {round}"))).await;
    bed.both_ways(|round| {
        bed.write(".new", &format!("renamed {round}"));
        fs::rename(bed.path(".new"), bed.path("net-conf.json")).unwrap();
    })
    .await;
    bed.both_ways(|round| match round % 2 {
        0 => fs::remove_file(bed.path("net-conf.json")).unwrap(),
        _ => bed.write("net-conf.json", "again"),
    })
    .await;
}

#[tokio::test]
async fn a_file_of_a_config_map_is_noticed_when_its_link_is_replaced() {
    let bed = Bed::new();
    bed.publish("v", "first");
    bed.both_ways(|round| bed.publish(&format!("v{round}"), &format!("text {round}"))).await;
    assert_eq!(bed.watched.read().unwrap(), b"text 3");
}

#[tokio::test]
async fn directories_that_come_and_go_are_noticed() {
    let bed = Bed::new();
    let (etc, away) = (bed.place.path().join("etc"), bed.place.path().join("away"));
    bed.both_ways(|round| match round % 2 {
        0 => bed.write("net-conf.json", "there"),
        _ => fs::remove_dir_all(&etc).unwrap(),
    })
    .await;
    bed.write("net-conf.json", "there");
    bed.both_ways(|round| match round % 2 {
        0 => fs::rename(&etc, &away).unwrap(),
        _ => fs::rename(&away, &etc).unwrap(),
    })
    .await;
    // Another directory in the same place, at once.
    bed.both_ways(|round| {
        let old = bed.place.path().join(format!("old{round}"));
        fs::rename(&etc, old).unwrap();
        bed.write("net-conf.json", &format!("replaced {round}"));
    })
    .await;
}

#[tokio::test]
async fn a_file_outside_that_a_link_names_is_noticed() {
    let bed = Bed::new();
    let target = bed.place.path().join("elsewhere");
    fs::write(&target, "first").unwrap();
    fs::create_dir_all(bed.path("")).unwrap();
    symlink(&target, bed.path("net-conf.json")).unwrap();
    bed.both_ways(|round| fs::write(&target, format!("in place {round}")).unwrap()).await;
}

#[tokio::test]
async fn what_leaves_the_content_as_it_is_is_no_change() {
    let bed = Bed::new();
    bed.publish("v0", "same");
    bed.watched.read().unwrap();
    let changed = bed.watched.changed();
    tokio::pin!(changed);
    for round in 1..4 {
        bed.publish(&format!("v{round}"), "same");
        bed.write("unrelated", &round.to_string());
        fs::remove_file(bed.path("unrelated")).unwrap();
        let early = tokio::time::timeout(SETTLE * 3, &mut changed).await;
        assert!(early.is_err(), "{round}");
    }
    // It does notice, all the same.
    bed.publish("v9", "other");
    tokio::time::timeout(LIMIT, changed).await.unwrap();
}

#[test]
fn of_a_plain_file_only_its_own_name_matters() {
    let bed = Bed::new();
    bed.write("net-conf.json", "x");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let watch = FileWatch::new(&bed.path("net-conf.json")).unwrap();
    let heard = || {
        let mut all = Vec::new();
        events(watch.inotify.get_ref(), |place, _, name| {
            all.push((name.to_owned(), watch.matters(place, name)));
        })
        .unwrap();
        all
    };
    bed.write(".lock", "");
    fs::write(bed.place.path().join("etc/other"), "").unwrap();
    let strangers = heard();
    assert!(!strangers.is_empty() && strangers.iter().all(|(_, matters)| !matters), "{strangers:?}");
    bed.write("net-conf.json", "y");
    assert!(heard().iter().any(|(_, matters)| *matters));
}

#[test]
fn network_file_systems_are_told_from_local_ones() {
    assert!(is_remote_magic(0x6969) && is_remote_magic(0xff53_4d42));
    for path in ["/proc", "/dev", "/"] {
        assert!(!is_remote(Path::new(path)), "{path}");
    }
}
