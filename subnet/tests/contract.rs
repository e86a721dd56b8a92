//! One contract, run over every store: the same sentences for memory, for files and for a real etcd.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

#[path = "contract/bed.rs"]
mod bed;
#[path = "contract/configuration.rs"]
mod configuration;
#[path = "contract/etcd_access.rs"]
mod etcd_access;
#[path = "contract/etcd_only.rs"]
mod etcd_only;
#[path = "contract/etcd_server.rs"]
mod etcd_server;
#[path = "contract/etcd_tls.rs"]
mod etcd_tls;
#[path = "contract/file_only.rs"]
mod file_only;
#[path = "contract/nodes.rs"]
mod nodes;
#[path = "contract/proxy.rs"]
mod proxy;
#[path = "contract/sentences.rs"]
mod sentences;
#[path = "contract/shapes.rs"]
mod shapes;

/// A test of each name for each kind of store.
macro_rules! stores {
    ($kind:ident: $bed:ty, $place:ident; $($sentence:ident)*) => {
        mod $kind {
            $(
                #[tokio::test]
                async fn $sentence() {
                    crate::$place::$sentence::<$bed>().await;
                }
            )*
        }
    };
}

/// What every store says about its configuration while it changes.
macro_rules! configured {
    ($kind:ident: $bed:ty) => {
        stores! { $kind: $bed, configuration;
            a_configuration_that_changes_is_noticed
            a_configuration_that_goes_and_comes_is_noticed
            leases_that_change_are_no_configuration
        }
    };
}

/// What every store fulfils, and what only those do that keep time.
macro_rules! contract {
    ($kind:ident: $bed:ty $(, $more:ident)*) => {
        stores! { $kind: $bed, sentences;
            a_snapshot_is_never_partial
            an_expired_lease_disappears
            the_same_node_gets_the_same_subnet
            two_claims_never_share
            two_nodes_with_one_public_address_never_get_two_leases
            silence_is_not_deletion
            a_first_listing_that_fails_is_tried_again
            a_deleted_lease_is_put_back
            a_lease_deleted_before_it_is_held_is_put_back
            a_lease_given_to_another_is_lost_not_overwritten
            a_lease_overlapped_while_away_is_lost
            a_lease_taken_while_it_is_held_is_lost
            a_rewritten_lease_is_contested
            acquiring_again_republishes_under_the_eyes_of_hold
            a_new_public_address_moves_the_lease
            the_previous_subnet_is_taken_again
            an_own_lease_that_fits_in_part_is_replaced
            a_full_network_says_so
            malformed_entries_disturb_nobody
            an_own_lease_that_was_damaged_is_restored
            the_configuration_is_read
            a_bad_configuration_is_named
            $($more)*
        }
    };
}

/// What every store does with leases of one family and of both.
macro_rules! shaped {
    ($kind:ident: $bed:ty $(, $more:ident)*) => {
        stores! { $kind: $bed, shapes;
            a_v6_only_lease_is_obtained_and_found_again
            a_v6_only_lease_is_put_back_and_lost_like_any_other
            a_v6_only_lease_expires
            ipv6_added_or_removed_keeps_the_ipv4_subnet_and_nobody_sees_the_node_missing_or_twice
            a_family_added_while_a_node_is_away_is_added_to_its_lease
            nodes_that_all_gain_ipv6_at_once_keep_ipv4_and_never_share
            a_network_that_grows_keeps_the_lease
            a_network_that_moves_gives_a_new_subnet_and_leaves_the_old_lease
            a_family_that_moves_keeps_the_other_one_and_leaves_the_old_lease_whole
            a_lease_that_the_network_moved_away_from_is_renewed_while_pods_are_in_it
            a_v4_only_peer_and_a_dual_peer_live_side_by_side
            $($more)*
        }
    };
}

shaped! { memory_shaped: crate::bed::InMemory }
shaped! { file_shaped: crate::bed::InFiles, a_reservation_that_gains_a_family_stays_one }
shaped! { etcd_shaped: crate::bed::InEtcd, a_reservation_that_gains_a_family_stays_one }

configured! { memory_configured: crate::bed::InMemory }
configured! { file_configured: crate::bed::InFiles }
configured! { etcd_configured: crate::bed::InEtcd }

contract! { memory: crate::bed::InMemory }
contract! { file: crate::bed::InFiles,
    a_missing_configuration_says_where, a_lease_is_renewed_in_time, a_reservation_stays_without_time_to_live,
    a_living_twin_is_noticed_although_it_writes_the_same
}
contract! { etcd: crate::bed::InEtcd,
    a_missing_configuration_says_where, a_lease_is_renewed_in_time, a_reservation_stays_without_time_to_live,
    a_living_twin_is_noticed_although_it_writes_the_same
}
