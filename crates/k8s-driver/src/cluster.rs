//! The cluster's API: which kinds there are, and errors in the driver's words.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant};

use krake_driver::{BackendError, Code};
use kube::Client;
use kube::core::ApiResource;
use kube::discovery::{Discovery, Scope};
use parking_lot::RwLock;

/// One call may take this long.
pub(crate) const CALL_TIME: Duration = Duration::from_secs(10);
/// How long the list of kinds is taken as it was.
const KINDS_AGE: Duration = Duration::from_secs(60);
/// A kind that is not known is looked up anew no more often than this.
const MISS_AGE: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Kinds {
    known: BTreeMap<(String, String), (ApiResource, bool)>,
    read_at: Option<Instant>,
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
        403 => Code::Forbidden,
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

    async fn discover(&self) -> Result<(), BackendError> {
        let discovery = call(
            "reading the kinds",
            Discovery::new(self.client.clone()).run(),
        )
        .await?;
        let mut known = BTreeMap::new();
        for group in discovery.groups() {
            for version in group.versions() {
                for (resource, capabilities) in group.versioned_resources(version) {
                    let namespaced = capabilities.scope == Scope::Namespaced;
                    known.insert(
                        (resource.api_version.clone(), resource.kind.clone()),
                        (resource, namespaced),
                    );
                }
            }
        }
        *self.kinds.write() = Kinds {
            known,
            read_at: Some(Instant::now()),
        };
        Ok(())
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
        self.known(api_version, kind).ok_or_else(|| {
            BackendError::new(
                Code::Unsupported,
                format!("the cluster does not serve {api_version} {kind}"),
            )
        })
    }
}
