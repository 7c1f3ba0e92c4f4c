//! What the backends have, and what of it owners get.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use krake_driver::{Inventory, Workload};
use krake_model::{AppKey, Epoch, Resources};
use tracing::{debug, warn};

use super::{Agent, CopyKey, SiteBackend};
use crate::federation::now;
use crate::rpc::{Reply, Reserve};
use crate::site::reservations::Refusal;

/// How often a backend's capacity is read, and leftovers are looked for.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(5);

impl Agent {
    /// API kinds that each backend serves; without the backends that do not say.
    pub fn served(&self) -> BTreeMap<String, Vec<String>> {
        let backends = self.inner.backends.iter();
        backends
            .filter_map(|backend| {
                let inventory = backend.inventory.lock();
                let kinds = inventory.as_ref().ok()?.kinds.clone();
                Some((backend.name.clone(), kinds))
            })
            .collect()
    }

    /// What a backend offers: (total, free after promises, promised).
    pub fn offer(
        &self,
        backend: &SiteBackend,
    ) -> Result<(Resources, Resources, Resources), String> {
        let inventory = backend.inventory.lock().clone()?;
        let (total, free) = self.room(&inventory);
        let held = backend.reservations.lock().held();
        Ok((total, free.saturating_sub(&held), held))
    }

    /// What there is of a cluster within the operator's limit, and what of it is free.
    fn room(&self, inventory: &Inventory) -> (Resources, Resources) {
        let total = minimum(&inventory.total, &self.inner.limit);
        let used = inventory.total.saturating_sub(&inventory.free);
        (total, total.saturating_sub(&used))
    }

    /// An owner asks for capacity.
    pub async fn reserve(&self, request: Reserve) -> Reply {
        let refused = |reason: String| Reply::Refused { reason };
        let backend = self
            .inner
            .backends
            .iter()
            .find(|backend| backend.name == request.backend);
        let Some(backend) = backend else {
            return refused(format!("this site has no backend `{}`", request.backend));
        };
        if self.inner.federation.is_leaving() {
            return refused("this site is leaving the federation".to_owned());
        }
        let Ok(components) = serde_json::from_slice(&request.manifests) else {
            return refused("the manifests cannot be read".to_owned());
        };
        let workload = Workload {
            uid: request.uid,
            app: AppKey::new(request.app.0, request.app.1),
            epoch: Epoch::default(),
            components,
        };
        if let Err(error) = backend.driver.admit(&workload).await {
            return refused(error.message);
        }
        let inventory = match backend.inventory.lock().clone() {
            Ok(inventory) => inventory,
            Err(reason) => return refused(format!("its cluster does not answer: {reason}")),
        };
        let (_, free) = self.room(&inventory);
        let now = now();
        let deadline = now.plus_millis(self.inner.reservation_ttl.as_millis() as i64);
        let mut table = backend.reservations.lock();
        table.expire(now);
        match table.reserve(request.uid, request.term, request.needs, &free, deadline) {
            Ok(()) => Reply::Reserved,
            Err(Refusal::NoCapacity { free }) => refused(format!(
                "not enough is free: {}m CPU, {} MiB of memory and {} pods are left",
                free.cpu_millis,
                free.memory_bytes >> 20,
                free.pods
            )),
            Err(Refusal::Stale { term }) => {
                refused(format!("an owner of term {term} has asked already"))
            }
        }
    }

    pub(super) async fn follow_inventory(self, backend: Arc<SiteBackend>) {
        let mut first = true;
        let mut interval = tokio::time::interval(INVENTORY_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let settled: Vec<CopyKey> = {
                let mut work = self.inner.work.lock();
                std::mem::take(&mut work.settled).into_iter().collect()
            };
            let read = backend.driver.inventory().await;
            let healthy = read.is_ok();
            let news = {
                let mut known = backend.inventory.lock();
                let read = read.map_err(|error| error.message);
                let news = *known != read;
                if let (true, Err(error)) = (news, &read) {
                    warn!(backend = backend.name, %error, "the site's backend does not answer; nothing new is run there until it does");
                }
                *known = read;
                news
            };
            if healthy {
                let mut table = backend.reservations.lock();
                table.expire(now());
                for (uid, _) in settled.iter().filter(|(_, name)| *name == backend.name) {
                    table.release(uid);
                }
            } else {
                self.inner.work.lock().settled.extend(settled);
            }
            if news {
                self.inner.changed.send_modify(|number| *number += 1);
            }
            if healthy && first {
                first = false;
                self.find_orphans(&backend).await;
            }
            if healthy && let Err(error) = backend.driver.tidy().await {
                debug!(backend = backend.name, %error, "not tidied");
            }
        }
    }
}

fn minimum(a: &Resources, b: &Resources) -> Resources {
    Resources {
        cpu_millis: a.cpu_millis.min(b.cpu_millis),
        memory_bytes: a.memory_bytes.min(b.memory_bytes),
        pods: a.pods.min(b.pods),
    }
}
