//! What is done to the sites of a running federation.

use std::time::Duration;

use anyhow::bail;
use futures::future::try_join_all;
use nix::sys::signal::Signal;

use super::Testnet;
use crate::kube::RealCluster;
use crate::process;
use crate::state::{KubeKind, SiteState, State, Wish, unknown};

/// A restarted site may stay unready, when others are away.
const READY_WITHIN: Duration = Duration::from_secs(20);

impl Testnet {
    /// Kills a site as a power cut would: node and cluster, or the node alone.
    ///
    /// # Errors
    /// When there is no such site, or nothing of it runs.
    pub async fn kill(&self, site: &str, node_only: bool) -> anyhow::Result<()> {
        let processes = self.directory.update(|state| {
            let site = state.site_mut(site)?;
            let processes = if node_only {
                site.node
                    .into_iter()
                    .filter(|node| node.is_alive())
                    .collect()
            } else {
                site.alive()
            };
            if processes.is_empty() {
                return Err(does_not_run(site));
            }
            site.wish = match node_only {
                true if !site.cluster_alive().is_empty() => Wish::NodeKilled,
                _ => Wish::Killed,
            };
            Ok(processes)
        })?;
        process::kill_now(&processes).await;
        Ok(())
    }

    /// Starts what was killed: the cluster first, then the node. Waits until the node answers, and
    /// a while until it is ready; whether it is. It cannot be while its groups have no majority or
    /// their leaders are behind a partition.
    ///
    /// # Errors
    /// When there is no such site, it runs already, is paused, or does not start.
    pub async fn restart(&self, site: &str) -> anyhow::Result<bool> {
        let state = self.directory.require()?;
        let before = state.site(site)?.clone();
        if before.wish == Wish::Paused {
            bail!("{site} is paused; let it go on with chaos resume {site}");
        }
        let expected = match state.kube {
            KubeKind::Real => 5,
            KubeKind::Embedded => 1,
        };
        let cluster_runs = before.cluster_alive().len() == expected;
        if cluster_runs && before.node_alive() {
            bail!("{site} runs already");
        }
        self.starter.write_files(&before, &state)?;
        let started = async {
            if !cluster_runs {
                process::kill_now(&before.cluster_alive()).await;
                self.starter.start_cluster(&before).await?;
            }
            if !before.node_alive() {
                self.starter.start_node(&before).await?;
            }
            Ok(())
        };
        // From now on a death is unexpected, and said so.
        let state = self.set_wish(site, Wish::Running, started).await?;
        let Some(process) = state.site(site)?.node else {
            return Ok(false);
        };
        let ready = self.starter.node_ready(site, process);
        match tokio::time::timeout(READY_WITHIN, ready).await {
            Ok(result) => result.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    async fn set_wish(
        &self,
        site: &str,
        wish: Wish,
        action: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<State> {
        action.await?;
        self.directory.update(|state| {
            state.site_mut(site)?.wish = wish;
            Ok(state.clone())
        })
    }

    /// Stops a site in time (SIGSTOP): it is there and says nothing.
    ///
    /// # Errors
    /// When there is no such site, or nothing of it runs.
    pub async fn pause(&self, site: &str) -> anyhow::Result<()> {
        self.directory.update(|state| {
            let site = state.site_mut(site)?;
            let processes = site.alive();
            if processes.is_empty() {
                return Err(does_not_run(site));
            }
            site.wish = Wish::Paused;
            for process in processes {
                process.signal(Signal::SIGSTOP);
            }
            Ok(())
        })
    }

    /// Lets a paused site go on.
    ///
    /// # Errors
    /// When there is no such site, or it is not paused.
    pub async fn resume(&self, site: &str) -> anyhow::Result<()> {
        let before = self.directory.require()?.site(site)?.clone();
        if before.wish != Wish::Paused {
            bail!("{site} is not paused");
        }
        let node = before.node.into_iter();
        let cluster = before.cluster.iter().map(|component| component.process);
        for process in node.chain(cluster) {
            process.signal(Signal::SIGCONT);
        }
        if let Some(assets) = &self.starter.assets {
            let processes = before.cluster.iter();
            let processes = processes.map(|c| (c.name.clone(), c.process)).collect();
            let dir = self.directory.cluster(site);
            let mut cluster = RealCluster::adopt(assets, &dir, processes)?;
            cluster.resume().await?;
            self.starter.note_cluster(site, &cluster.detach())?;
        }
        let node_alive = before.node_alive();
        let after = if node_alive {
            Wish::Running
        } else {
            Wish::NodeKilled
        };
        self.set_wish(site, after, async {
            if node_alive {
                // Partitions that were made meanwhile.
                self.client(site)?.block(before.blocked.iter()).await?;
            }
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// Cuts every site of `one` off from every site of `other`. Partitions add up.
    ///
    /// # Errors
    /// When a site is unknown or on both sides, or a node does not take its list.
    pub async fn partition(&self, one: &[String], other: &[String]) -> anyhow::Result<()> {
        let state = self.directory.update(|state| {
            for name in one.iter().chain(other) {
                state.site(name)?;
            }
            if let Some(both) = one.iter().find(|name| other.contains(name)) {
                bail!("{both} is on both sides; a site cannot be cut off from itself");
            }
            for (ours, theirs) in [(one, other), (other, one)] {
                for name in ours {
                    state.site_mut(name)?.blocked.extend(theirs.iter().cloned());
                }
            }
            Ok(state.clone())
        })?;
        self.send_blocks(&state).await
    }

    /// Ends all partitions.
    ///
    /// # Errors
    /// When a node does not take its list.
    pub async fn heal(&self) -> anyhow::Result<()> {
        let state = self.directory.update(|state| {
            for site in &mut state.sites {
                site.blocked.clear();
            }
            Ok(state.clone())
        })?;
        self.send_blocks(&state).await
    }

    /// Nodes that do not run or are paused get their list when they run again.
    async fn send_blocks(&self, state: &State) -> anyhow::Result<()> {
        let running = state
            .sites
            .iter()
            .filter(|site| site.node_alive() && site.wish != Wish::Paused);
        let sent = running.map(|site| async {
            let client = self.client(&site.profile.name)?;
            client.block(site.blocked.iter()).await
        });
        try_join_all(sent).await?;
        Ok(())
    }

    /// Changes a metric of a site, also for later starts of its node.
    ///
    /// # Errors
    /// When the site or the metric is unknown, the value is impossible, or the node does not
    /// answer.
    pub async fn metric(&self, site: &str, name: &str, value: f64) -> anyhow::Result<()> {
        check_metric(name, value)?;
        let state = self.directory.update(|state| {
            let metrics = &mut state.site_mut(site)?.profile.metrics;
            metrics.insert(name.to_owned(), value);
            Ok(state.clone())
        })?;
        let changed = state.site(site)?;
        self.starter.write_files(changed, &state)?;
        if changed.node_alive() && changed.wish != Wish::Paused {
            self.client(site)?.metric(name, value).await?;
        }
        Ok(())
    }
}

fn does_not_run(site: &SiteState) -> anyhow::Error {
    anyhow::anyhow!(
        "{} does not run; start it with chaos restart",
        site.profile.name
    )
}

fn check_metric(name: &str, value: f64) -> anyhow::Result<()> {
    let definitions = krake_model::metric::default_definitions();
    let known: Vec<&str> = definitions.keys().map(String::as_str).collect();
    let Some(definition) = definitions.get(name) else {
        return Err(unknown("metric", name, &known));
    };
    if !value.is_finite() || value < definition.min.min(0.0) {
        bail!(
            "{name} cannot be {value}: it is a number of {}, usually {} to {}",
            definition.unit,
            definition.min,
            definition.max
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_checked_before_anybody_is_asked() {
        check_metric("carbon", 1200.0).unwrap();
        check_metric("pue", 1.2).unwrap();
        let text = check_metric("carbn", 1.0).unwrap_err().to_string();
        assert!(text.contains("did you mean `carbon`?"), "{text}");
        let text = check_metric("carbon", f64::NAN).unwrap_err().to_string();
        assert!(text.contains("usually 0 to 1000"), "{text}");
        assert!(check_metric("price", -0.1).is_err());
    }
}
