//! An API in Kubernetes' conventions, for any kinds over any store: what stock `kubectl`, client-go
//! and kube-rs need to get, list, watch, apply, patch and delete.
//!
//! A [`kinds::Kind`] is data (schema, columns, flags); [`service::Service`] serves all of them with
//! one machinery over a [`store::Store`], checked by a [`service::Admission`].

mod discovery;
pub mod error;
mod json;
pub mod kinds;
pub mod managed;
mod metadata;
mod openapi_v2;
pub mod schema;
pub mod selector;
pub mod serve;
pub mod service;
pub mod store;
mod strategic;
pub mod table;
mod write;

pub use crate::error::{ApiError, Cause};
pub use crate::kinds::{Column, Compute, Kind, Registry};
pub use crate::service::{Admission, AdmitAll, FieldValidation, Hold, Service};
pub use crate::store::{
    Event, EventKind, EventLog, Freshness, LazyObject, Listing, MemoryStore, Scope, Staleness,
    Store,
};
pub use crate::write::{finalizers, marked};
