//! What the catalog says of this node, kept in line with its configuration.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};
use krake_consensus::{Command, Expect};
use krake_model::{GroupId, Member};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::{objects, put};
use crate::catalog::PATIENCE;
use crate::config::Config;
use crate::federation::Federation;
use crate::records;
use crate::site::agent::Agent;

/// Before it is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps what the catalog says of this node in line with its configuration and with the API kinds
/// that its backends serve, until the program ends.
pub async fn publish_own(federation: Federation, config: Config, agent: Agent) {
    let catalog = &federation.catalog;
    let mut changes = agent.changes();
    loop {
        changes.mark_unchanged();
        let served = agent.served();
        if catalog
            .host
            .read_barrier(&[GroupId::META], PATIENCE)
            .await
            .is_ok()
        {
            match try_publish(&federation, &config, &served).await {
                Ok(()) if changes.changed().await.is_ok() => continue,
                Ok(()) => return,
                Err(error) => {
                    warn!(%error, "the catalog does not have this site's configuration yet");
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn try_publish(
    federation: &Federation,
    config: &Config,
    served: &BTreeMap<String, Vec<String>>,
) -> anyhow::Result<()> {
    let meta = GroupId::META;
    let catalog = &federation.catalog;
    let key = records::member_key(&federation.own);
    let (mut own, entry) = catalog
        .read::<Member>(meta, &key)
        .context("this node is not in the list of members")?;
    let site = config.site_record();
    if own.site.name != site.name {
        bail!(
            "site.name is `{}` in the configuration, but this node joined as `{}`; names cannot be changed",
            site.name,
            own.site.name
        );
    }
    let addresses = config.advertised().to_vec();
    let mut operations = Vec::new();
    if own.site != site || own.addresses != addresses {
        own.site = site;
        own.addresses = addresses;
        let expect = Expect::Revision(entry.modified);
        operations.push(put(key, records::write(&own), expect));
    }
    let (new_site, new_node) = objects(&own);
    for (plural, new) in [("sites", new_site), ("nodes", new_node)] {
        let key = format!("{plural}/{}", own.site.name);
        let Some((mut object, entry)) = catalog.read::<Value>(meta, &key) else {
            continue;
        };
        let mut spec = new["spec"].clone();
        if plural == "sites" {
            if let Some(cordoned) = object.pointer("/spec/cordoned") {
                spec["cordoned"] = cordoned.clone();
            }
            let known = object.pointer("/spec/backends");
            let backends = backends(config, served, known);
            if known.is_some() || backends != json!({}) {
                spec["backends"] = backends;
            }
        }
        if object["spec"] == spec {
            continue;
        }
        object["spec"] = spec;
        let generation = object["metadata"]["generation"].as_u64().unwrap_or(0);
        object["metadata"]["generation"] = json!(generation + 1);
        let expect = Expect::Revision(entry.modified);
        operations.push(put(key, records::write(&object), expect));
    }
    if operations.is_empty() {
        return Ok(());
    }
    catalog
        .host
        .propose(meta, Command::new(operations), PATIENCE)
        .await?;
    info!("the federation knows this site's new configuration");
    Ok(())
}

/// What is committed of a site's backends: the API kinds they serve, of one that does not say now
/// those that it served before (I11).
fn backends(
    config: &Config,
    served: &BTreeMap<String, Vec<String>>,
    known: Option<&Value>,
) -> Value {
    let names = config.backends.iter().map(|backend| &backend.name);
    let record = |name: &String| {
        let kinds = match served.get(name) {
            Some(kinds) => json!(kinds),
            None => known?.get(name)?.get("kinds")?.clone(),
        };
        Some((name.clone(), json!({"kinds": kinds})))
    };
    Value::Object(names.filter_map(record).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_backend_served_stays_known_while_it_does_not_answer() {
        let config: Config = toml::from_str("[[backends]]\nname = 'default'").unwrap();
        let answers = BTreeMap::from([("default".to_owned(), vec!["v1/Secret".to_owned()])]);
        let known = backends(&config, &answers, None);
        assert_eq!(known, json!({"default": {"kinds": ["v1/Secret"]}}));
        assert_eq!(backends(&config, &BTreeMap::new(), Some(&known)), known);
        let old = json!({"default": {"kinds": []}, "gone": {"kinds": ["v1/Secret"]}});
        assert_eq!(backends(&config, &answers, Some(&old)), known);
    }
}
