//! `krake-testnet status`, and the table of sites that `up` shows, too.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, ContentArrangement, Table, TableStyle};
use krake_testnet::client::NodeClient;
use krake_testnet::state::{Directory, SiteState, State, Wish};
use serde_json::{Value, json};

use super::output::{Output, print, print_json};

/// What a node sees of the federation.
#[derive(Debug, Default)]
pub struct View {
    /// Whose view it is; `None` when no node answers.
    pub by: Option<String>,
    sites: BTreeMap<String, Value>,
    apps: Vec<App>,
}

#[derive(Debug)]
struct App {
    name: String,
    site: String,
    ready: String,
    state: String,
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

impl View {
    /// The view of the first node that answers.
    pub async fn of(directory: &Directory, state: &State) -> Self {
        for site in &state.sites {
            let name = &site.profile.name;
            if !site.node_alive() || site.wish == Wish::Paused {
                continue;
            }
            let Ok(client) = NodeClient::new(name, &directory.socket(name)) else {
                continue;
            };
            if let Ok(view) = Self::ask(name, &client).await {
                return view;
            }
        }
        Self::default()
    }

    async fn ask(by: &str, client: &NodeClient) -> anyhow::Result<Self> {
        let sites = client.get("/apis/krake.dev/v1/sites").await?;
        // Without a quorum there are no applications to see, but sites there are.
        let apps = client.get("/apis/krake.dev/v1/applications").await;
        Ok(Self::from_lists(by, &sites, &apps.unwrap_or_default()))
    }

    fn from_lists(by: &str, sites: &Value, apps: &Value) -> Self {
        let copies = items(apps).flat_map(|app| {
            let name = text(&app["metadata"]["name"]);
            let copies = app["status"]["copies"].as_array().into_iter().flatten();
            copies.map(move |copy| App {
                name: name.clone(),
                site: text(&copy["site"]),
                ready: text(&copy["ready"]),
                state: text(&copy["state"]),
            })
        });
        Self {
            by: Some(by.to_owned()),
            apps: copies.collect(),
            sites: items(sites)
                .map(|site| (text(&site["metadata"]["name"]), site["status"].clone()))
                .collect(),
        }
    }

    fn seen(&self, site: &str) -> String {
        self.sites
            .get(site)
            .map_or_else(|| "?".to_owned(), |status| text(&status["state"]))
    }

    fn apps_at(&self, site: &str) -> Vec<String> {
        let here = self.apps.iter().filter(|app| app.site == site);
        here.map(|app| format!("{} {} {}", app.name, app.ready, app.state.to_lowercase()))
            .collect()
    }

    fn free(&self, site: &str) -> String {
        let Some(status) = self.sites.get(site) else {
            return String::new();
        };
        let backend = &status["backends"]["default"];
        let memory = text(&backend["freeMemory"]);
        let gibibytes = memory
            .strip_suffix("Mi")
            .and_then(|number| number.parse::<u64>().ok())
            .map_or(memory.clone(), |mebibytes| {
                format!("{} Gi", mebibytes / 1024)
            });
        match text(&backend["freeCpu"]) {
            cpu if cpu.is_empty() => String::new(),
            cpu => format!("{cpu} cores, {gibibytes}"),
        }
    }
}

/// One word for what the processes of a site do.
fn doing(directory: &Directory, site: &SiteState) -> &'static str {
    let has_left = || directory.data(&site.profile.name).join("left").exists();
    let cluster_runs = !site.cluster.is_empty() && site.cluster_alive().len() == site.cluster.len();
    match (site.wish, site.node_alive(), cluster_runs) {
        (Wish::Paused, _, _) => "paused",
        (_, true, true) => "running",
        (Wish::Killed, false, _) => "killed",
        (Wish::NodeKilled, false, true) => "node killed",
        (Wish::Stopped, false, _) => "stopped",
        (_, true, false) => "cluster died",
        (_, false, true) if has_left() => "left",
        (_, false, true) => "node died",
        (_, false, false) => "died",
    }
}

/// A table without lines, as wide as it needs to be.
pub fn plain_table() -> Table {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new())
        .set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// The sites for people.
pub fn site_table(directory: &Directory, state: &State, view: &View) -> String {
    let mut table = plain_table();
    table.set_header([
        "SITE",
        "PLACE",
        "OPERATOR",
        "g CO2/kWh",
        "EUR/kWh",
        "PUE",
        "ERF",
        "FREE",
        "STATE",
        "APPS",
    ]);
    for column in 3..=6 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for site in &state.sites {
        let profile = &site.profile;
        let name = &profile.name;
        let metric = |metric: &str, digits: usize| {
            let value = profile.metrics.get(metric);
            value.map_or_else(String::new, |value| format!("{value:.digits$}"))
        };
        let state = match (doing(directory, site), view.seen(name)) {
            ("running", seen) => seen,
            (doing, seen) => format!("{seen} ({doing})"),
        };
        let cut_off = if site.blocked.is_empty() {
            String::new()
        } else {
            let others: Vec<&str> = site.blocked.iter().map(String::as_str).collect();
            format!(", cut off from {}", others.join(" "))
        };
        table.add_row([
            name.clone(),
            format!("{} {}", profile.place, profile.country),
            profile.operator.clone(),
            metric("carbon", 0),
            metric("price", 3),
            metric("pue", 2),
            metric("erf", 2),
            view.free(name),
            format!("{state}{cut_off}"),
            view.apps_at(name).join(", "),
        ]);
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned());
    lines.collect::<Vec<_>>().join("\n")
}

/// Shows the testnet.
pub async fn status(directory: &Directory, output: Output) -> anyhow::Result<()> {
    let state = directory.require()?;
    let view = View::of(directory, &state).await;
    if output == Output::Json {
        let listed = krake_testnet::sites(directory, &state);
        let sites = state.sites.iter().zip(listed).map(|(site, listed)| {
            let mut value = json!(listed);
            let name = &site.profile.name;
            value["state"] = doing(directory, site).into();
            value["seen"] = view.seen(name).into();
            value["cutOffFrom"] = json!(site.blocked);
            value["apps"] = json!(view.apps_at(name));
            value["metrics"] = json!(site.profile.metrics);
            value
        });
        return print_json(&json!({
            "dir": directory.path(),
            "kube": state.kube,
            "seenBy": view.by,
            "sites": sites.collect::<Vec<_>>(),
        }));
    }
    let alive = state.alive().len();
    print(&format!(
        "{} sites, {} Kubernetes, {alive} processes in {}{}\n",
        state.sites.len(),
        state.kube,
        directory.path().display(),
        match &view.by {
            Some(by) => format!("; as the node of {by} sees it"),
            None => "; no node answers".to_owned(),
        }
    ));
    print(&site_table(directory, &state, &view));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_view_says_where_apps_are_and_what_is_free() {
        let sites = json!({"items": [{"metadata": {"name": "oslo"}, "status": {"state": "Alive",
            "backends": {"default": {"freeCpu": "47.5", "freeMemory": "2048Mi"}}}}]});
        let apps = json!({"items": [{"metadata": {"name": "shop"}, "status": {"copies": [
            {"site": "oslo", "ready": "2/2", "state": "Ready"}]}}]});
        let view = View::from_lists("oslo", &sites, &apps);
        assert_eq!(view.apps_at("oslo"), ["shop 2/2 ready"]);
        assert_eq!(view.free("oslo"), "47.5 cores, 2 Gi");
        assert_eq!(view.seen("oslo"), "Alive");
        assert_eq!(view.seen("paris"), "?");
        assert_eq!(view.free("paris"), "");
    }
}
