//! The ledger: what was applied for an app, kept in its namespace.

use krake_model::{AppKey, AppUid, Epoch};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Label with the app's UID, on everything made for it.
pub const UID_LABEL: &str = "krake.dev/app-uid";
/// Label of ledgers.
pub(crate) const LEDGER_LABEL: &str = "krake.dev/ledger";
/// Label of namespaces that we made, with the federation's namespace.
pub(crate) const NAMESPACE_LABEL: &str = "krake.dev/namespace";
/// Annotation with the app's name.
pub(crate) const APP_ANNOTATION: &str = "krake.dev/app";

/// One applied object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ObjectRef {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) name: String,
}

impl std::fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} `{}`", self.kind, self.name)
    }
}

impl ObjectRef {
    pub(crate) fn of(manifest: &Value) -> Option<Self> {
        let text = |pointer: &str| {
            manifest
                .pointer(pointer)
                .and_then(Value::as_str)
                .filter(|text| !text.is_empty())
                .map(ToOwned::to_owned)
        };
        Some(Self {
            api_version: text("/apiVersion")?,
            kind: text("/kind")?,
            name: text("/metadata/name")?,
        })
    }
}

/// What was applied for an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ledger {
    pub(crate) uid: AppUid,
    pub(crate) app: AppKey,
    pub(crate) epoch: Epoch,
    pub(crate) namespace: String,
    pub(crate) objects: Vec<ObjectRef>,
}

impl Ledger {
    pub(crate) fn name(uid: AppUid) -> String {
        format!("krake-app-{uid}")
    }

    pub(crate) fn to_config_map(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": Self::name(self.uid),
                "namespace": self.namespace,
                "labels": {UID_LABEL: self.uid.to_string(), LEDGER_LABEL: "true",
                    "app.kubernetes.io/managed-by": "krake"},
                "annotations": {APP_ANNOTATION: self.app.to_string()},
            },
            "data": {
                "app": json!(self.app).to_string(),
                "epoch": json!(self.epoch).to_string(),
                "objects": json!(self.objects).to_string(),
            },
        })
    }

    pub(crate) fn from_config_map(object: &Value) -> Option<Self> {
        let label = object
            .get("metadata")?
            .get("labels")?
            .get(UID_LABEL)?
            .as_str()?;
        let data = |key: &str| object.get("data")?.get(key)?.as_str();
        Some(Self {
            uid: label.parse().ok()?,
            app: serde_json::from_str(data("app")?).ok()?,
            epoch: serde_json::from_str(data("epoch")?).ok()?,
            namespace: object.pointer("/metadata/namespace")?.as_str()?.to_owned(),
            objects: serde_json::from_str(data("objects")?).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_survives_its_config_map() {
        let ledger = Ledger {
            uid: "00000000-0000-0000-0000-000000000007".parse().unwrap(),
            app: AppKey::new("default", "shop"),
            epoch: Epoch {
                incarnation: 0,
                term: 4,
                index: 9,
            },
            namespace: "krake-default".to_owned(),
            objects: vec![ObjectRef {
                api_version: "v1".to_owned(),
                kind: "Secret".to_owned(),
                name: "s".to_owned(),
            }],
        };
        assert_eq!(
            Ledger::from_config_map(&ledger.to_config_map()),
            Some(ledger)
        );
        assert_eq!(Ledger::from_config_map(&json!({"data": {}})), None);
    }
}
