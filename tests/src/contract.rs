//! The driver's contract: one suite of cases for any Kubernetes, embedded or real.
//!
//! Every case has namespaces of its own, so all of them run at the same time on one cluster. A case
//! waits for states, never for time.

mod applying;
mod connecting;
mod deleting;
mod observing;
mod owning;
mod support;

use std::path::Path;
use std::pin::Pin;
use std::time::Instant;

use anyhow::{Result, bail};

use self::support::{Site, WITHIN};

type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;
type Case = (&'static str, fn(Site) -> Running);

macro_rules! cases {
    ($($module:ident: [$($name:ident),* $(,)?]),* $(,)?) => {
        /// All cases, by name.
        const CASES: &[Case] =
            &[$($((stringify!($name), |site| Box::pin($module::$name(site))),)*)*];
    };
}

cases![
    applying: [
        six_kinds_become_ready,
        applying_again_changes_nothing,
        custom_objects_are_applied,
        a_definition_and_its_objects_come_together,
        what_a_new_version_lacks_is_removed,
        drift_is_noticed_and_repaired,
        fields_of_others_stay,
        a_new_image_is_rolled_out,
        what_cannot_run_is_not_ready_and_says_why,
    ],
    owning: [
        two_apps_that_want_the_same_object_conflict,
        what_krake_did_not_make_is_left_alone,
        an_existing_namespace_is_never_adopted,
        an_older_epoch_is_refused_also_after_a_restart,
        cluster_scoped_kinds_are_refused,
        denied_kinds_are_refused,
        an_unknown_kind_is_unsupported,
        a_wrong_manifest_is_invalid,
    ],
    deleting: [
        a_deletion_waits_for_finalizers_and_leaves_nothing,
        a_deletion_ends_when_the_namespace_is_gone,
        an_app_comes_back_after_its_namespace_was_removed,
        a_first_apply_that_was_cut_short_is_removed,
    ],
    observing: [
        a_restarted_driver_sees_what_runs,
        changes_are_told,
        the_inventory_counts_what_pods_request,
    ],
    connecting: [
        a_kubeconfig_that_points_nowhere_is_named,
        an_api_that_does_not_answer_is_unreachable,
        a_wrong_token_is_unreachable,
    ],
];

/// Runs every case on the cluster of `kubeconfig`.
///
/// # Panics
/// When a case fails: with the names of all that did, and why.
pub async fn run(kubeconfig: &Path) {
    let mut cases = tokio::task::JoinSet::new();
    for (name, case) in CASES {
        let site = Site {
            kubeconfig: kubeconfig.to_owned(),
            case: name,
        };
        cases.spawn(async move {
            let started = Instant::now();
            let outcome = tokio::time::timeout(WITHIN * 2, case(site)).await;
            let outcome = outcome.unwrap_or_else(|_| bail!("it does not end"));
            (*name, started.elapsed(), outcome)
        });
    }
    let mut failed = Vec::new();
    while let Some(ended) = cases.join_next().await {
        let (name, took, outcome) = ended.expect("a case does not panic");
        if let Err(error) = outcome {
            failed.push(format!("{name} ({} ms): {error:#}", took.as_millis()));
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {} cases failed:\n{}",
        failed.len(),
        CASES.len(),
        failed.join("\n")
    );
}
