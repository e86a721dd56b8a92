//! `subnet.env`, while other programs use it.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_subnet_file_that_another_program_rewrites_is_left_alone_until_its_content_would_change() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    let own = std::fs::read_to_string(bed.file()).unwrap();
    let gateway = own.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).unwrap();
    let docker = format!("DOCKER_OPTS=\" --bip={gateway} --mtu=1450\"\n");
    std::fs::write(bed.file(), &docker).unwrap();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(std::fs::read_to_string(bed.file()).unwrap(), docker);
    let notes = bed.health.all().1.join("\n");
    assert!(notes.contains("rewritten by another program"), "{notes}");
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    bed.kernel.lock().host = host(1400, "192.0.2.1/24");
    bed.bell.notify_one();
    bed.until("the new MTU", |bed| std::fs::read_to_string(bed.file()).unwrap().contains("FLANNEL_MTU=1350"))
        .await;
    assert!(bed.health.all().1.is_empty());
    for broken in ["", "garbage\n", &own[..own.len() / 2], &own.replace("1450", "9000")] {
        std::fs::write(bed.file(), broken).unwrap();
        bed.bell.notify_one();
        bed.until("the own content", |bed| {
            std::fs::read_to_string(bed.file()).unwrap() == own.replace("1450", "1350")
        })
        .await;
    }
    std::fs::remove_file(bed.file()).unwrap();
    bed.bell.notify_one();
    bed.until("the file", |bed| bed.file().exists()).await;
}
