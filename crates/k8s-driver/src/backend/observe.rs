//! How an app is, from what the watches show of its objects.

use krake_driver::{Observed, Phase};

use super::objects::fingerprint;
use super::{Inner, Known};
use crate::cache::Noticed;
use crate::ledger::Ledger;
use crate::readiness;

impl Inner {
    pub(super) fn on_noticed(&self, noticed: &Noticed) {
        let mut known = self.known.lock();
        let Some(entry) = known.get_mut(&noticed.uid) else {
            return;
        };
        if entry.applying || entry.deleting || entry.ledger.namespace != noticed.namespace {
            return;
        }
        let is_ledger = noticed.object.name == Ledger::name(noticed.uid);
        let Some(applied) = entry.applied.get(&noticed.object) else {
            if is_ledger && noticed.value.is_none() {
                entry.drifted = true;
            }
            return;
        };
        match &noticed.value {
            None => entry.drifted = true,
            Some(value) => {
                let changed = applied.is_before(&fingerprint(value));
                let terminating = value.pointer("/metadata/deletionTimestamp").is_some();
                entry.drifted |= changed && !terminating;
            }
        }
    }

    pub(super) fn observe_known(&self, known: &Known) -> Observed {
        let ledger = &known.ledger;
        let (mut ready, mut wanted, mut all, mut broken) = (0_u32, 0_u32, true, false);
        let mut message = None;
        let mut have_pods = false;
        let mut plain = (0_u32, 0_u32);
        for object in &ledger.objects {
            let mut namespace = ledger.namespace.as_str();
            let mut found = self.cache.get(ledger.uid, object, namespace);
            if found.is_none() {
                namespace = "";
                found = self.cache.get(ledger.uid, object, namespace);
            }
            // What the watch still shows of the version before says nothing about this one.
            let applied = known.applied.get(object);
            let is_old = found
                .as_ref()
                .zip(applied)
                .is_some_and(|(value, applied)| fingerprint(value).is_before(applied));
            let Some(value) = found.filter(|_| !is_old) else {
                plain.1 += 1;
                all = false;
                message.get_or_insert_with(|| {
                    if !is_old && self.cache.is_synced(&object.api_version, &object.kind) {
                        format!("{object} is not there yet")
                    } else {
                        format!("{object} is not observed yet")
                    }
                });
                continue;
            };
            let health = readiness::judge(&object.api_version, &object.kind, &value);
            let pods = matches!(
                object.kind.as_str(),
                "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Pod" | "Job"
            );
            if pods {
                have_pods = true;
                ready += health.ready;
                wanted += health.wanted;
            } else {
                plain.0 += u32::from(health.is_ready());
                plain.1 += 1;
            }
            if !health.is_ready() {
                all = false;
                broken |= health.broken;
                message.get_or_insert_with(|| {
                    format!("{object}: {}", health.message.unwrap_or_default())
                });
            }
        }
        if !have_pods {
            (ready, wanted) = plain;
        }
        let phase = if all {
            Phase::Ready
        } else if broken || known.was_ready {
            Phase::Degraded
        } else {
            Phase::Progressing
        };
        Observed {
            uid: ledger.uid,
            app: ledger.app.clone(),
            epoch: ledger.epoch,
            phase,
            ready,
            wanted,
            namespace: ledger.namespace.clone(),
            message,
            drifted: known.drifted,
        }
    }
}
