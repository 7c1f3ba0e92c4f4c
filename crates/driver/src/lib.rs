//! The driver's contract: what a site can do with an application, whatever runs it.
//!
//! A [`Backend`] is one Kubernetes cluster (or, later, an `OpenStack` project or a vSphere pool). Its
//! calls start work and return at once; what becomes of it shows in [`Backend::observe`], and
//! [`Backend::changes`] tells when to look. The node decides and keeps deadlines; a backend never
//! acts by itself.

use async_trait::async_trait;
use krake_model::{AppKey, AppUid, Epoch, Resources};
use serde_json::Value;
use thiserror::Error;
use tokio::sync::broadcast;

/// What an app is to a backend.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Its identity: the mark on everything made for it.
    pub uid: AppUid,
    /// Its name.
    pub app: AppKey,
    /// The assignment's fence: a backend refuses an older one than it has seen.
    pub epoch: Epoch,
    /// What it consists of, in the order given: Kubernetes manifests for a Kubernetes backend.
    pub components: Vec<Value>,
}

/// What a backend has and can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// What it has in all.
    pub total: Resources,
    /// What is neither used nor requested.
    pub free: Resources,
    /// API kinds it serves, as `group/version/Kind`, sorted.
    pub kinds: Vec<String>,
}

/// Why a backend cannot do something: the code is for decisions, the message for people.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct BackendError {
    /// What kind of trouble.
    pub code: Code,
    /// What, where and what to do.
    pub message: String,
}

/// Kinds of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// There is no room; elsewhere there may be.
    NoCapacity,
    /// The site's policy or its cluster's rules say no; another site's may not.
    Forbidden,
    /// The components are wrong; they will be wrong everywhere.
    Invalid,
    /// Something is there that belongs to somebody else.
    Conflict,
    /// A newer assignment is known.
    Outdated,
    /// The backend serves no such kind.
    Unsupported,
    /// The backend does not answer: try again.
    Unreachable,
    /// It answers that it cannot now: try again.
    Busy,
}

impl Code {
    /// Whether trying again here may help.
    pub const fn is_temporary(self) -> bool {
        matches!(self, Self::Unreachable | Self::Busy)
    }

    /// Whether another site may do better.
    pub const fn elsewhere(self) -> bool {
        matches!(self, Self::NoCapacity | Self::Forbidden | Self::Unsupported)
    }
}

impl BackendError {
    /// With a code and a message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// How an app is at a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not all of it is there or ready yet.
    Progressing,
    /// All of it is ready.
    Ready,
    /// It was there, but something of it is broken.
    Degraded,
}

/// What a backend sees of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Its identity.
    pub uid: AppUid,
    /// Its name, as noted at the backend.
    pub app: AppKey,
    /// Newest assignment applied.
    pub epoch: Epoch,
    /// How it is.
    pub phase: Phase,
    /// Ready pods (or objects that have no pods).
    pub ready: u32,
    /// Wanted ones.
    pub wanted: u32,
    /// Where in the backend: a Kubernetes namespace.
    pub namespace: String,
    /// Why it is not ready.
    pub message: Option<String>,
    /// Something was changed or removed by another hand: apply again.
    pub drifted: bool,
}

/// How far a deletion is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    /// Nothing is left.
    Gone,
    /// These objects are still there.
    InProgress(Vec<String>),
}

/// One place that runs applications.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// `kubernetes`, …
    fn kind(&self) -> &'static str;

    /// Capacity and abilities, read now.
    ///
    /// # Errors
    /// [`Code::Unreachable`] with the reason when it does not answer.
    async fn inventory(&self) -> Result<Inventory, BackendError>;

    /// Whether the site's policy admits a workload; changes nothing.
    ///
    /// # Errors
    /// Why not.
    async fn admit(&self, workload: &Workload) -> Result<(), BackendError>;

    /// Makes the backend run exactly this: applies every component, removes what an earlier apply
    /// made and this one no longer has. Idempotent; returns when everything is accepted, not when
    /// it is ready. May be cancelled and repeated at any point.
    ///
    /// # Errors
    /// The first thing that could not be applied; what was applied stays and is completed by the
    /// next call.
    async fn apply(&self, workload: &Workload) -> Result<(), BackendError>;

    /// Everything that carries our mark, also of apps this node does not know.
    ///
    /// # Errors
    /// When the backend does not answer.
    async fn observe(&self) -> Result<Vec<Observed>, BackendError>;

    /// One app; `None`: nothing of it is there.
    ///
    /// # Errors
    /// When the backend does not answer.
    async fn observe_one(&self, uid: AppUid) -> Result<Option<Observed>, BackendError>;

    /// Takes note of what may have been applied although nothing is noted of it here: the process
    /// may have ended in the middle of the first apply. [`Backend::delete`] finds it then. Does
    /// nothing when the app is known.
    ///
    /// # Errors
    /// When it cannot be noted.
    async fn adopt(&self, workload: &Workload) -> Result<(), BackendError>;

    /// Removes everything of an app; repeat until [`Deletion::Gone`]. Idempotent.
    ///
    /// # Errors
    /// When something cannot be removed, or a newer assignment is known.
    async fn delete(&self, uid: AppUid, epoch: Epoch) -> Result<Deletion, BackendError>;

    /// Removes what is left of no app (empty namespaces we made).
    ///
    /// # Errors
    /// When the backend does not answer.
    async fn tidy(&self) -> Result<(), BackendError>;

    /// Apps of which something changed. A receiver that falls behind looks at all of them.
    fn changes(&self) -> broadcast::Receiver<AppUid>;
}
