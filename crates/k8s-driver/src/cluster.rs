//! The cluster's API: which kinds there are, and errors in the driver's words.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use krake_driver::{BackendError, Code};
use kube::Client;
use kube::core::ApiResource;
use parking_lot::RwLock;
use tracing::debug;

/// One call may take this long.
pub(crate) const CALL_TIME: Duration = Duration::from_secs(10);
/// A watch ends after this many seconds and is asked for again.
pub(crate) const WATCH_SECONDS: u32 = 280;
/// Pause before a broken watch starts anew; doubles up to the second.
pub(crate) const WATCH_PAUSE: Duration = Duration::from_millis(200);
pub(crate) const WATCH_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long the list of kinds is taken as it was.
const KINDS_AGE: Duration = Duration::from_secs(15);
/// A kind that is not known is looked up anew no more often than this.
const MISS_AGE: Duration = Duration::from_secs(2);

/// Group versions asked for their kinds at the same time.
const GROUPS_AT_ONCE: usize = 8;

#[derive(Debug, Default)]
struct Kinds {
    known: BTreeMap<(String, String), (ApiResource, bool)>,
    /// Group versions that could not say what they have: their kinds are not absent but unknown.
    unread: BTreeSet<String>,
    read_at: Option<Instant>,
}

impl Kinds {
    fn add(&mut self, api_version: &str, list: APIResourceList) {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        for found in list.resources {
            // Subresources are no kinds.
            if found.name.contains('/') {
                continue;
            }
            let resource = ApiResource {
                group: group.to_owned(),
                version: version.to_owned(),
                api_version: api_version.to_owned(),
                kind: found.kind.clone(),
                plural: found.name,
            };
            let key = (api_version.to_owned(), found.kind);
            self.known.insert(key, (resource, found.namespaced));
        }
    }
}

/// A client and what it found out.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    kinds: RwLock<Kinds>,
}

/// Runs a call within its time limit and translates its error.
pub(crate) async fn call<T>(
    what: &str,
    work: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, BackendError> {
    match tokio::time::timeout(CALL_TIME, work).await {
        Err(_) => Err(BackendError::new(
            Code::Unreachable,
            format!(
                "{what}: the cluster gave no answer within {} s",
                CALL_TIME.as_secs()
            ),
        )),
        Ok(Err(error)) => Err(translate(what, &error)),
        Ok(Ok(value)) => Ok(value),
    }
}

/// Like [`call`], for a call to which the status `code` is an answer too: `None`.
pub(crate) async fn call_unless<T>(
    code: u16,
    what: &str,
    work: impl Future<Output = Result<T, kube::Error>>,
) -> Result<Option<T>, BackendError> {
    let work = async {
        match work.await {
            Err(error) if status_code(&error) == Some(code) => Ok(None),
            answer => answer.map(Some),
        }
    };
    call(what, work).await
}

pub(crate) const fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

fn translate(what: &str, error: &kube::Error) -> BackendError {
    let kube::Error::Api(status) = error else {
        return BackendError::new(
            Code::Unreachable,
            format!("{what}: the cluster cannot be reached: {}", deepest(error)),
        );
    };
    let code = match status.code {
        403 if status.message.contains("exceeded quota") => Code::NoCapacity,
        401 => Code::Unreachable,
        // The namespace is on its way out; a new one can be made then.
        403 if status.message.contains("because it is being terminated") => Code::Busy,
        403 => Code::Forbidden,
        // What server-side apply answers to a manifest that its schema does not fit.
        500 if status
            .message
            .contains("failed to create typed patch object") =>
        {
            Code::Invalid
        }
        404 | 409 | 429 | 500..=599 => Code::Busy,
        _ => Code::Invalid,
    };
    BackendError::new(code, format!("{what}: {}", status.message))
}

/// The innermost cause says what happened; the outer ones only where.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            kinds: RwLock::default(),
        }
    }

    /// Reads the kinds of every group. One that goes meanwhile is gone; one that fails (an
    /// extension API server that is down) does not hide the others.
    async fn discover(&self) -> Result<(), BackendError> {
        let what = "reading the kinds";
        let client = &self.client;
        let core = call(what, client.list_core_api_versions()).await?;
        let groups = call(what, client.list_api_groups()).await?;
        let mut versions: Vec<(String, bool)> = core
            .versions
            .into_iter()
            .map(|version| (version, true))
            .collect();
        for group in groups.groups {
            let of_group = group.versions.into_iter();
            versions.extend(of_group.map(|version| (version.group_version, false)));
        }
        let lists: Vec<(String, Result<APIResourceList, BackendError>)> = stream::iter(versions)
            .map(|(version, is_core)| async move {
                let list = if is_core {
                    call(what, client.list_core_api_resources(&version)).await
                } else {
                    call_unless(404, what, client.list_api_group_resources(&version))
                        .await
                        .map(Option::unwrap_or_default)
                };
                (version, list)
            })
            .buffer_unordered(GROUPS_AT_ONCE)
            .collect()
            .await;
        let mut kinds = Kinds {
            read_at: Some(Instant::now()),
            ..Kinds::default()
        };
        for (version, list) in lists {
            match list {
                Ok(list) => kinds.add(&version, list),
                Err(error) if error.code == Code::Unreachable => return Err(error),
                Err(error) => {
                    debug!(version, %error, "the kinds of a group are not known");
                    kinds.unread.insert(version);
                }
            }
        }
        *self.kinds.write() = kinds;
        Ok(())
    }

    /// Kinds were added: the next one that is not known is looked up.
    pub(crate) fn look_again(&self) {
        self.kinds.write().read_at = None;
    }

    /// A kind that was served is not any more, or so it seems: it is looked up anew.
    pub(crate) fn forget(&self, api_version: &str, kind: &str) {
        let mut kinds = self.kinds.write();
        kinds
            .known
            .remove(&(api_version.to_owned(), kind.to_owned()));
        kinds.read_at = None;
    }

    fn age(&self) -> Option<Duration> {
        self.kinds.read().read_at.map(|at| at.elapsed())
    }

    /// All kinds, as `group/version/Kind`.
    pub(crate) async fn kinds(&self) -> Result<Vec<String>, BackendError> {
        if self.age().is_none_or(|age| age > KINDS_AGE) {
            self.discover().await?;
        }
        let kinds = self.kinds.read();
        Ok(kinds
            .known
            .keys()
            .map(|(api, kind)| format!("{api}/{kind}"))
            .collect())
    }

    fn known(&self, api_version: &str, kind: &str) -> Option<(ApiResource, bool)> {
        let key = (api_version.to_owned(), kind.to_owned());
        self.kinds.read().known.get(&key).cloned()
    }

    /// Where objects of a kind are, and whether they are in namespaces.
    pub(crate) async fn resource(
        &self,
        api_version: &str,
        kind: &str,
    ) -> Result<(ApiResource, bool), BackendError> {
        if let Some(found) = self.known(api_version, kind) {
            return Ok(found);
        }
        if self.age().is_none_or(|age| age > MISS_AGE) {
            self.discover().await?;
        }
        if let Some(found) = self.known(api_version, kind) {
            return Ok(found);
        }
        if self.kinds.read().unread.contains(api_version) {
            return Err(BackendError::new(
                Code::Busy,
                format!("the cluster cannot say now whether it serves {api_version} {kind}"),
            ));
        }
        Err(BackendError::new(
            Code::Unsupported,
            format!("the cluster does not serve {api_version} {kind}"),
        ))
    }
}
