//! Labelled objects as the watch shows them, by app.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use krake_model::AppUid;
use kube::api::{Api, DynamicObject};
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event};
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::debug;

use crate::cluster::{WATCH_PAUSE, WATCH_PAUSE_MAX, WATCH_SECONDS};
use crate::ledger::{ObjectRef, UID_LABEL};

/// Something happened to a labelled object.
#[derive(Debug, Clone)]
pub(crate) struct Noticed {
    pub(crate) uid: AppUid,
    pub(crate) object: ObjectRef,
    pub(crate) namespace: String,
    /// `None`: it is gone.
    pub(crate) value: Option<Arc<Value>>,
}

type Key = (ObjectRef, String);

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<AppUid, BTreeMap<Key, Arc<Value>>>,
    watched: BTreeSet<(String, String)>,
    synced: BTreeSet<(String, String)>,
}

/// The cache; watches are added kind by kind.
#[derive(Debug)]
pub(crate) struct Cache {
    state: RwLock<State>,
    noticed: mpsc::Sender<Noticed>,
}

fn uid_of(object: &DynamicObject) -> Option<AppUid> {
    object
        .metadata
        .labels
        .as_ref()?
        .get(UID_LABEL)?
        .parse()
        .ok()
}

impl Cache {
    pub(crate) fn new(noticed: mpsc::Sender<Noticed>) -> Self {
        Self {
            state: RwLock::default(),
            noticed,
        }
    }

    pub(crate) fn get(
        &self,
        uid: AppUid,
        object: &ObjectRef,
        namespace: &str,
    ) -> Option<Arc<Value>> {
        let state = self.state.read();
        let objects = state.objects.get(&uid)?;
        objects
            .get(&(object.clone(), namespace.to_owned()))
            .cloned()
    }

    pub(crate) fn is_synced(&self, api_version: &str, kind: &str) -> bool {
        let key = (api_version.to_owned(), kind.to_owned());
        self.state.read().synced.contains(&key)
    }

    /// Starts to watch a kind, once.
    pub(crate) fn watch(self: &Arc<Self>, client: &kube::Client, resource: &ApiResource) {
        let key = (resource.api_version.clone(), resource.kind.clone());
        if !self.state.write().watched.insert(key) {
            return;
        }
        let api: Api<DynamicObject> = Api::all_with(client.clone(), resource);
        let cache = Arc::downgrade(self);
        let resource = resource.clone();
        tokio::spawn(async move {
            let config = watcher::Config::default()
                .labels(UID_LABEL)
                .timeout(WATCH_SECONDS);
            let mut events = watcher::watcher(api, config).boxed();
            let mut pause = WATCH_PAUSE;
            let mut listing: Option<BTreeSet<Key>> = None;
            loop {
                let event = events.try_next().await;
                let Some(cache) = cache.upgrade() else {
                    return;
                };
                match event {
                    Ok(Some(event)) => {
                        pause = WATCH_PAUSE;
                        cache.take(&resource, event, &mut listing).await;
                    }
                    Ok(None) => return,
                    Err(error) => {
                        debug!(kind = resource.kind, %error, "a watch broke and starts anew");
                        drop(cache);
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(WATCH_PAUSE_MAX);
                    }
                }
            }
        });
    }

    async fn take(
        &self,
        resource: &ApiResource,
        event: Event<DynamicObject>,
        listing: &mut Option<BTreeSet<Key>>,
    ) {
        match event {
            Event::Init => *listing = Some(BTreeSet::new()),
            Event::InitApply(object) => {
                if let (Some(keys), Some(key)) = (listing.as_mut(), key(resource, &object)) {
                    keys.insert(key);
                }
                self.put(resource, object).await;
            }
            Event::InitDone => {
                let keys = listing.take().unwrap_or_default();
                self.forget_others(resource, &keys).await;
                let key = (resource.api_version.clone(), resource.kind.clone());
                self.state.write().synced.insert(key);
            }
            Event::Apply(object) => self.put(resource, object).await,
            Event::Delete(object) => {
                if let (Some(uid), Some(key)) = (uid_of(&object), key(resource, &object)) {
                    self.remove(uid, key).await;
                }
            }
        }
    }

    async fn put(&self, resource: &ApiResource, mut object: DynamicObject) {
        let (Some(uid), Some(key)) = (uid_of(&object), key(resource, &object)) else {
            return;
        };
        // Large, and of no use here.
        object.metadata.managed_fields = None;
        let Ok(value) = serde_json::to_value(&object) else {
            return;
        };
        let value = Arc::new(value);
        {
            let mut state = self.state.write();
            let objects = state.objects.entry(uid).or_default();
            objects.insert(key.clone(), Arc::clone(&value));
        }
        let noticed = Noticed {
            uid,
            object: key.0,
            namespace: key.1,
            value: Some(value),
        };
        let _ = self.noticed.send(noticed).await;
    }

    async fn remove(&self, uid: AppUid, key: Key) {
        {
            let mut state = self.state.write();
            if let Some(objects) = state.objects.get_mut(&uid) {
                objects.remove(&key);
                if objects.is_empty() {
                    state.objects.remove(&uid);
                }
            }
        }
        let noticed = Noticed {
            uid,
            object: key.0,
            namespace: key.1,
            value: None,
        };
        let _ = self.noticed.send(noticed).await;
    }

    async fn forget_others(&self, resource: &ApiResource, keys: &BTreeSet<Key>) {
        let gone: Vec<(AppUid, Key)> = {
            let state = self.state.read();
            state
                .objects
                .iter()
                .flat_map(|(uid, objects)| objects.keys().map(|key| (*uid, key.clone())))
                .filter(|(_, key)| {
                    key.0.api_version == resource.api_version
                        && key.0.kind == resource.kind
                        && !keys.contains(key)
                })
                .collect()
        };
        for (uid, key) in gone {
            self.remove(uid, key).await;
        }
    }
}

fn key(resource: &ApiResource, object: &DynamicObject) -> Option<Key> {
    let reference = ObjectRef {
        api_version: resource.api_version.clone(),
        kind: resource.kind.clone(),
        name: object.metadata.name.clone()?,
    };
    Some((
        reference,
        object.metadata.namespace.clone().unwrap_or_default(),
    ))
}
