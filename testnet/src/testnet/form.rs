//! Starting the sites of a federation, and waiting until it is formed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future::{try_join, try_join_all};
use serde_json::Value;
use tokio::sync::{Semaphore, watch};

use super::{CONTEXT, DEMO, Testnet, UpOptions, is_ready};
use crate::process::{LOOK, look_among};
use crate::progress::Step;
use crate::site::READY_PER_SITE;
use crate::state::{KubeKind, SiteState, State};

/// Where the demo app is in the API.
const DEMO_PATH: &str = "/apis/krake.dev/v1/namespaces/default/applications/shop";
/// A federation that has not formed by then never will.
const FORM_WITHIN: Duration = Duration::from_secs(180);
/// The demo app is ready by then or not at all.
const DEMO_WITHIN: Duration = Duration::from_secs(120);
/// Clusters that start at a time: more would only wait for each other on a small machine.
const STARTS_MAX: usize = 8;

/// What the starts of all sites share.
struct Parts<'a> {
    clusters: &'a Step,
    nodes: &'a Step,
    /// Has the token.
    founder: &'a str,
    /// Founds the federation, or lets others join.
    first: &'a str,
    /// Sites that belong to no federation yet.
    newcomers: BTreeSet<String>,
    /// Whether the first one is ready, so that others can join.
    open: watch::Sender<bool>,
    /// How many have not joined yet, the first one apart.
    absent: watch::Sender<usize>,
    starts: Semaphore,
}

/// The voters of each group that `members` can have: one more failure survived with 3, two with 5.
const fn voters_of(members: usize) -> usize {
    match members {
        0..=2 => 1,
        3..=4 => 3,
        _ => 5,
    }
}

impl Testnet {
    pub(super) async fn bring_up(
        mut self,
        state: &State,
        options: &UpOptions,
    ) -> anyhow::Result<Self> {
        if state.kube == KubeKind::Real {
            self.starter.assets = Some(crate::kube::assets(&self.progress).await?);
        }
        for site in &state.sites {
            self.starter.write_files(site, state)?;
        }
        self.write_contexts(state)?;
        self.start_sites(state).await?;
        let patience = FORM_WITHIN + READY_PER_SITE * state.site_count();
        let formed = tokio::time::timeout(patience, self.until_formed(state)).await;
        formed.map_err(|_| {
            anyhow::anyhow!(
                "the federation has not formed after {} s; the logs are {}/sites/*/node.log",
                patience.as_secs(),
                self.directory.path().display()
            )
        })??;
        if options.demo {
            self.deploy_demo().await?;
        }
        Ok(self)
    }

    fn write_contexts(&self, state: &State) -> anyhow::Result<()> {
        use krake_cli::context::{Context as Entry, ContextFile};
        let founder = state.sites.first().context("a testnet without sites")?;
        let servers = state.sites.iter();
        let entry = Entry {
            servers: servers
                .map(|site| format!("http://127.0.0.1:{}", site.api_port))
                .collect(),
            token_file: Some(self.directory.token(&founder.profile.name)),
            namespace: None,
        };
        let file = ContextFile {
            current_context: Some(CONTEXT.to_owned()),
            contexts: BTreeMap::from([(CONTEXT.to_owned(), entry)]),
        };
        Ok(file.save(&self.directory.contexts())?)
    }

    /// All sites at once. Newcomers wait for the first one, and with running until all have joined:
    /// on a small machine running nodes would leave that one no time for the others. It is the founder,
    /// or somebody else where that one has left; who has left joins again.
    async fn start_sites(&self, state: &State) -> anyhow::Result<()> {
        let founder = &state.sites.first().context("no sites")?.profile.name;
        let mut all = state.sites.iter().map(|site| &site.profile.name);
        let first = all
            .find(|name| self.starter.is_member(name))
            .unwrap_or(founder);
        let names = state.sites.iter().map(|site| &site.profile.name);
        let newcomers: BTreeSet<String> = names
            .filter(|name| !self.starter.is_member(name))
            .cloned()
            .collect();
        let absent = newcomers.iter().filter(|name| *name != first).count();
        let parts = Parts {
            clusters: &self.progress.step("clusters", state.sites.len()),
            nodes: &self.progress.step("nodes", state.sites.len()),
            founder,
            first,
            newcomers,
            open: watch::Sender::new(false),
            absent: watch::Sender::new(absent),
            starts: Semaphore::new(STARTS_MAX),
        };
        let all = state.sites.iter().map(|site| self.start_site(site, &parts));
        try_join_all(all).await?;
        Ok(())
    }

    async fn start_site(&self, site: &SiteState, parts: &Parts<'_>) -> anyhow::Result<()> {
        let name = &site.profile.name;
        let starter = &self.starter;
        let is_first = name == parts.first;
        let is_newcomer = parts.newcomers.contains(name);
        let cluster = async {
            let _turn = parts.starts.acquire().await?;
            starter.start_cluster(site).await?;
            parts.clusters.advance();
            anyhow::Ok(())
        };
        let member = async {
            if is_newcomer && is_first {
                starter.init(name).await?;
            } else if is_newcomer {
                parts.open.subscribe().wait_for(|open| *open).await?;
                {
                    let _turn = parts.starts.acquire().await?;
                    starter.join(&starter.client(parts.first)?, name).await?;
                }
                parts.absent.send_modify(|absent| *absent -= 1);
                parts
                    .absent
                    .subscribe()
                    .wait_for(|absent| *absent == 0)
                    .await?;
            }
            Ok(())
        };
        try_join(cluster, member).await?;
        starter.write_api_kubeconfig(site, parts.founder)?;
        let process = {
            let _turn = parts.starts.acquire().await?;
            starter.start_node(site).await?
        };
        starter.node_ready(name, process).await?;
        parts.nodes.advance();
        if is_first {
            parts.open.send_replace(true);
        }
        Ok(())
    }

    /// Every node sees every site alive and with a report, and every group has the voters that it
    /// can have.
    async fn until_formed(&self, state: &State) -> anyhow::Result<()> {
        let count = state.sites.len();
        let views = self.progress.step("views agree", count);
        let all = state
            .sites
            .iter()
            .map(|site| self.until_sees_all(site, count, &views));
        let groups = usize::from(state.shards) + 1;
        let voters = self.progress.step("voters", groups);
        let voters = self.until_voters(state, groups, voters_of(count), &voters);
        tokio::select! {
            formed = try_join(try_join_all(all), voters) => formed.map(|_| ()),
            death = self.until_death() => Err(death),
        }
    }

    async fn until_sees_all(
        &self,
        site: &SiteState,
        count: usize,
        views: &Step,
    ) -> anyhow::Result<()> {
        let client = self.client(&site.profile.name)?;
        loop {
            if let Ok(list) = client.get("/apis/krake.dev/v1/sites").await
                && complete_sites(&list) == count
            {
                views.advance();
                return Ok(());
            }
            tokio::time::sleep(look_among(self.starter.site_count) * 2).await;
        }
    }

    /// Ends when one of its processes does.
    async fn until_death(&self) -> anyhow::Error {
        loop {
            if let Err(death) = self.check_alive() {
                return death;
            }
            tokio::time::sleep(LOOK * 5).await;
        }
    }

    async fn until_voters(
        &self,
        state: &State,
        groups: usize,
        voters: usize,
        step: &Step,
    ) -> anyhow::Result<()> {
        // Beyond a few nodes each has only some groups: ask several.
        let clients = state
            .sites
            .iter()
            .map(|site| self.client(&site.profile.name))
            .collect::<anyhow::Result<Vec<_>>>()?;
        loop {
            let mut grown = BTreeSet::new();
            for client in clients.iter().take(8) {
                if let Ok(status) = client.get("/v1/status").await {
                    grown.extend(grown_groups(&status, voters));
                }
                if grown.len() >= groups {
                    break;
                }
            }
            step.set(grown.len());
            if grown.len() >= groups {
                return Ok(());
            }
            tokio::time::sleep(look_among(self.starter.site_count) * 2).await;
        }
    }

    fn check_alive(&self) -> anyhow::Result<()> {
        match self.unexpected_deaths()?.first() {
            None => Ok(()),
            Some(death) => bail!("{death}"),
        }
    }

    async fn deploy_demo(&self) -> anyhow::Result<()> {
        let step = self.progress.step("demo app `shop`", 1);
        let state = self.directory.require()?;
        let founder = state.sites.first().context("no sites")?;
        let client = self.client(&founder.profile.name)?;
        client
            .apply(DEMO_PATH, DEMO)
            .await
            .context("the demo app was not accepted")?;
        let end = tokio::time::Instant::now() + DEMO_WITHIN;
        let mut last = Value::Null;
        while tokio::time::Instant::now() < end {
            if let Ok(app) = client.get(DEMO_PATH).await {
                if is_ready(&app) {
                    step.advance();
                    return Ok(());
                }
                last = app["status"].clone();
            }
            self.check_alive()?;
            tokio::time::sleep(LOOK).await;
        }
        bail!(
            "the demo app is not ready after {} s; its status is {last}",
            DEMO_WITHIN.as_secs()
        )
    }
}

/// Sites in a list from the API that are alive and have reported a healthy cluster.
fn complete_sites(list: &Value) -> usize {
    let complete = |site: &&Value| {
        site["status"]["state"] == "Alive"
            && site["status"]["backends"]["default"]["healthy"] == true
            && site["status"]["backends"]["default"]["kinds"] != 0
    };
    list["items"]
        .as_array()
        .map_or(0, |items| items.iter().filter(complete).count())
}

/// Groups of a node's status that have a leader and so many voters.
fn grown_groups(status: &Value, voters: usize) -> Vec<String> {
    let groups = status["groups"].as_array().into_iter().flatten();
    groups
        .filter(|group| {
            group["leader"].is_string() && group["voters"].as_array().map_or(0, Vec::len) == voters
        })
        .filter_map(|group| group["group"].as_str().map(ToOwned::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_complete_sites_and_grown_groups_count() {
        let site = |state: &str, healthy: bool| json!({"status": {"state": state, "backends": {"default": {"healthy": healthy}}}});
        let list =
            json!({"items": [site("Alive", true), site("Alive", false), site("Lost", true), {}]});
        assert_eq!(complete_sites(&list), 1);
        let status = json!({"groups": [
            {"group": "meta", "leader": "a", "voters": ["a", "b", "c"]},
            {"group": "0", "leader": null, "voters": ["a", "b", "c"]},
            {"group": "1", "leader": "a", "voters": ["a"]},
        ]});
        assert_eq!(grown_groups(&status, 3), ["meta"]);
        assert_eq!(
            [voters_of(1), voters_of(2), voters_of(4), voters_of(100)],
            [1, 1, 3, 5]
        );
    }
}
